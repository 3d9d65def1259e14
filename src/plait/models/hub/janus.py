"""The picture tokenizer of Janus and Chameleon (``JanusVQVAE``, ``ChameleonVQVAE``) of Hugging Face and ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import one_of, require, understood
from plait.models.image_tokens import ImageTokenSizes


def _block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(ours=f"{ours}.norm_in", theirs=(f"{theirs}.norm1",)),
        Rule(ours=f"{ours}.conv_in", theirs=(f"{theirs}.conv1",)),
        Rule(ours=f"{ours}.norm_out", theirs=(f"{theirs}.norm2",)),
        Rule(ours=f"{ours}.conv_out", theirs=(f"{theirs}.conv2",)),
        Rule(ours=f"{ours}.shortcut", theirs=(f"{theirs}.nin_shortcut",)),
    )


def _attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(ours=f"{ours}.norm", theirs=(f"{theirs}.norm",)),
        Rule(ours=f"{ours}.qkv", theirs=(f"{theirs}.q", f"{theirs}.k", f"{theirs}.v")),
        Rule(ours=f"{ours}.out", theirs=(f"{theirs}.proj_out",)),
    )


def _stack(name: str, way: str, resize: str) -> tuple[Rule, ...]:
    ours, theirs = f"{name}.scales.*", f"{name}.{way}.*"
    return (
        Rule(ours=f"{name}.conv_in", theirs=(f"{name}.conv_in",)),
        *_block(f"{ours}.blocks.*", f"{theirs}.block.*"),
        *_attention(f"{ours}.attentions.*", f"{theirs}.attn.*"),
        Rule(ours=f"{ours}.resize.conv", theirs=(f"{theirs}.{resize}.conv",)),
        *_block(f"{name}.middle.0", f"{name}.mid.block_1"),
        *_attention(f"{name}.middle.1", f"{name}.mid.attn_1"),
        *_block(f"{name}.middle.2", f"{name}.mid.block_2"),
        Rule(ours=f"{name}.norm", theirs=(f"{name}.norm_out",)),
        Rule(ours=f"{name}.conv_out", theirs=(f"{name}.conv_out",)),
    )


RULES = (
    *_stack("encoder", "down", "downsample"),
    *_stack("decoder", "up", "upsample"),
    Rule(ours="quantizer.codes", theirs=("quantize.embedding.weight",)),
    Rule(ours="to_codes", theirs=("quant_conv",)),
    Rule(ours="from_codes", theirs=("post_quant_conv",)),
)
"""Janus counts the scales of its decoder from the coarsest, as we do."""


@understood("a VQ model")
def sizes_from(config: Mapping[str, Any]) -> ImageTokenSizes:
    """Sizes of the ``vq_config`` of a ``config.json``.

    Janus compares its vectors with codes as they are, but draws from codes of length 1 (transformers 5): the two agree
    for unit codes, which ours are made to be. Chameleon uses codes as they are.

    Raises:
        CheckpointError: It asks for something that ours has not.
    """
    kind = one_of(config, "model_type", ("janus_vqgan", "chameleon_vqgan"), place="config.json")
    require(config, {"double_latent": False, "in_channels": 3})
    if kind == "chameleon_vqgan":
        require(config, {"attn_resolutions": None, "attn_type": "vanilla"})
    else:
        require(config, {"out_channels": 3})
    return ImageTokenSizes(
        channels=config["base_channels"],
        multipliers=tuple(config["channel_multiplier"]),
        blocks=config["num_res_blocks"],
        d_latent=config["latent_channels"],
        codes=config["num_embeddings"],
        d_code=config["embed_dim"],
        attention=kind == "janus_vqgan",
        dropout=config["dropout"],
        normalize=kind == "janus_vqgan",
    )


def config_from(sizes: ImageTokenSizes, *, rows: int) -> dict[str, Any]:
    """The ``config.json`` of Janus' tokenizer.

    Args:
        sizes: Shape.
        rows: Codes a side of the pictures it draws.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    given = {"groups": sizes.groups, "attention": sizes.attention, "normalize": sizes.normalize}
    require(given, {"groups": 32, "attention": True, "normalize": True}, place="ImageTokenSizes")
    return {
        "architectures": ["JanusVQVAE"],
        "model_type": "janus_vqgan",
        "base_channels": sizes.channels,
        "channel_multiplier": list(sizes.multipliers),
        "num_res_blocks": sizes.blocks,
        "latent_channels": sizes.d_latent,
        "num_embeddings": sizes.codes,
        "embed_dim": sizes.d_code,
        "dropout": sizes.dropout,
        "num_patches": rows,
    }


def to_ours(state: Mapping[str, Tensor], *, place: str = "") -> dict[str, Tensor]:
    """Weights of a tokenizer under our names; Chameleon's files have no decoder.

    Raises:
        CheckpointError: Names have no place here.
    """
    return renamed(state, RULES, place=place)


def to_official(state: Mapping[str, Tensor], sizes: ImageTokenSizes) -> dict[str, Tensor]:
    """Our weights under the names of a file.

    Codes that are compared as unit vectors are written as such, because transformers compares what is in the file.
    Moving averages of codes, which only training needs, are left out.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    known = {name: value for name, value in state.items() if name not in ("quantizer.usage", "quantizer.total")}
    if sizes.normalize:
        known["quantizer.codes"] = functional.normalize(known["quantizer.codes"], dim=-1)
    return to_theirs(known, RULES, place="ImageTokenizer")
