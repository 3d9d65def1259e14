"""Any resolution from settings to a loss: towers by name, placeholders, batch, tiles, connector, decoder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from plait.assembly.contract import ImageContract
from plait.assembly.fit import Native, Tiles
from plait.assembly.resolution import cell_of, read_fit, slots_of
from plait.assembly.towers import load_image_tower
from plait.core.errors import ConfigError, DataError
from plait.core.events import Event, Events
from plait.core.tensors import Batch, Patches
from plait.core.types import MediaRef, Sample, Text, Turn
from plait.data.collate import collate
from plait.data.template import Template
from plait.models import specs
from plait.models.build import build_connector, build_encoder
from plait.models.connectors.projection import Chain, RowEnds
from plait.models.multimodal import MultimodalLM
from plait.models.towers.convnet import EfficientNetLite
from plait.models.towers.tiled import TiledEncoder

VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PLACEHOLDER = 300


def saved(model, folder: Path) -> str:
    model.save_pretrained(folder)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def naflex(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = Siglip2VisionModel(Siglip2VisionConfig(**VIT, patch_size=8, num_patches=16))
    return saved(model, tmp_path_factory.mktemp("naflex"))


@pytest.fixture(scope="module")
def one_size(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = Aimv2VisionModel(Aimv2VisionConfig(**VIT, image_size=32, patch_size=8))
    return saved(model, tmp_path_factory.mktemp("aimv2"))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- towers --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_tower_at_the_pictures_own_resolution(naflex: str) -> None:
    seen: list[Event] = []
    fit = specs.Native(max_pixels=4096, join=2)
    tower = load_image_tower(naflex, dtype="float32", fit=fit, events=Events(listeners=(seen.append,)))
    assert tower.contract.fit == Native(cell=16, max_pixels=4096)
    assert any("interpolated to the shape of every picture" in event.text for event in seen)
    media = tower.prepare(picture(40, 100))
    assert media.grid.tolist() == [[1, 96, 32]]
    assert tower.encoder(media).grid.tolist() == [[1, 12, 4]]
    square = load_image_tower(naflex, dtype="float32")
    again = load_image_tower(**json.loads(json.dumps(dict(tower.settings))))
    assert again.key == tower.key != square.key
    assert again.contract == tower.contract
    assert load_image_tower(naflex, dtype="float32", fit={"kind": "square"}).key == square.key
    assert "fit" not in square.settings


@torch.inference_mode()
def test_a_tower_of_one_size_takes_tiles_and_no_other_shape(one_size: str) -> None:
    tower = load_image_tower(one_size, dtype="float32", fit={"kind": "tiles", "max_tiles": 4})
    assert tower.contract.fit == Tiles(max_tiles=4)
    media = tower.prepare(picture(90, 50))
    assert media.grid.tolist() == [[1, 32, 32], [1, 64, 64]]
    found = tower.encoder(media)
    assert found.grid.tolist() == [[1, 4, 4], [1, 8, 8]]
    assert tower.encoder.grid_out(media.grid).equal(found.grid)
    assert load_image_tower(**tower.settings).key == tower.key != load_image_tower(one_size, dtype="float32").key
    with pytest.raises(ConfigError, match="fit is native, this tower takes pictures of 32 x 32 pixels only"):
        load_image_tower(one_size, fit=specs.Native())


def test_settings_that_describe_no_fit_are_refused(one_size: str) -> None:
    with pytest.raises(ConfigError, match=r"fit, native\.join: Input should be greater than or equal to 1"):
        load_image_tower(one_size, fit={"kind": "native", "join": 0})
    with pytest.raises(ConfigError, match="fit"):
        read_fit({"kind": "stretched"})
    assert read_fit(None) == specs.Square()


def test_the_cell_of_a_tower_is_read_off_its_account() -> None:
    assert cell_of(build_encoder(specs.ViT(size=32, patch=5, d=8, depth=1, heads=1)), 32) == 5
    assert cell_of(build_encoder(specs.ResNet(size=64, width=8)), 64) == 32
    assert cell_of(EfficientNetLite(max_cells=3), 224) == 32
    with pytest.raises(ConfigError, match="become 1 row of tokens"):
        cell_of(EfficientNetLite(max_cells=1), 224)


# --- from the template to the decoder ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
    return fast


TOWER = specs.ViT(size=16, patch=4, d=16, depth=1, heads=2, position="sincos")


def parts(fit: Tiles | Native | None) -> tuple[ImageContract, TiledEncoder, Chain]:
    torch.manual_seed(0)
    encoder = TiledEncoder(build_encoder(TOWER), 16) if isinstance(fit, Tiles) else build_encoder(TOWER)
    contract = ImageContract(size=16) if fit is None else ImageContract(size=16, fit=fit)
    return contract, encoder, Chain(build_connector(specs.Mlp(shuffle=2), d_in=16, d_out=24), RowEnds(24))


def language(encoder: torch.nn.Module, connector: torch.nn.Module) -> MultimodalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": 260, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1}
    decoder = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=20_000))
    return MultimodalLM({"image": encoder}, {"image": connector}, decoder, placeholder=PLACEHOLDER)


class Album:
    """Samples with pictures of given sizes, and their pixels."""

    def __init__(self) -> None:
        self.pixels: dict[str, Patches] = {}

    def sample(self, name: str, contract: ImageContract, *sizes: tuple[int, int]) -> Sample:
        refs: list[MediaRef] = []
        for width, height in sizes:
            shown = picture(width, height, seed=len(self.pixels))
            digest = hashlib.sha256(shown.tobytes() + f"{shown.size} {len(self.pixels)}".encode()).hexdigest()
            self.pixels[digest] = contract.prepare(shown)
            refs.append(MediaRef(modality="image", sha256=digest, uri="", width=width, height=height))
        user = Turn(role="user", parts=(*refs, Text(text="what?")))
        answer = Turn(role="assistant", parts=(Text(text="a cat"),), trained=True)
        return Sample(id=name, turns=(user, answer))


FITS = [None, Tiles(max_tiles=4), Native(cell=8, max_pixels=1024)]


@pytest.mark.row("S4-44")
@pytest.mark.parametrize("fit", FITS, ids=["square", "tiles", "native"])
def test_pictures_of_any_size_from_the_template_to_the_gradient(
    fit: Tiles | Native | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    contract, encoder, connector = parts(fit)
    model, album = language(encoder, connector), Album()
    samples = [
        album.sample("none", contract),
        album.sample("dot", contract, (1, 1)),
        album.sample("lines", contract, (1, 4000), (4000, 1)),
        album.sample("many", contract, *[(1 + 3 * i, 50 - i) for i in range(50)]),
        album.sample("usual", contract, (40, 30)),
    ]
    slots = slots_of(contract, encoder.grid_out, connector.grid_out)
    template = Template(tokenizer, placeholder=PLACEHOLDER, slots=slots)
    rendered = [(sample.id, template.sample(sample)) for sample in samples]
    longest = max(len(found) for _, found in rendered)

    def account(grid: torch.Tensor) -> torch.Tensor:
        return connector.grid_out(encoder.grid_out(grid))

    batch: Batch = collate(rendered, album.pixels, grid_out=account, encoded=False, row=longest, pad=0)
    assert len(batch.item_row["image"]) == len(batch.media["image"].grid)
    out = model(batch)
    assert out.logits is not None
    assert out.logits.isfinite().all()
    # What is read for a sample does not depend on what else is in the batch.
    wanted = {sample.id: rendering for sample, (_, rendering) in zip(samples, rendered, strict=True)}
    place = batch.sample_ids.index("lines")
    counts = batch.segment_ids.amax(1).tolist()
    row = next(r for r in range(len(counts)) if sum(counts[: r + 1]) > place)
    segment = place - sum(counts[:row]) + 1
    alone = collate([("lines", wanted["lines"])], album.pixels, grid_out=account, encoded=False, row=longest, pad=0)
    here = model.hidden(alone)[0, alone.segment_ids[0] == 1]
    torch.testing.assert_close(out.hidden[row, batch.segment_ids[row] == segment], here, atol=1e-4, rtol=1e-4)
    out.logits.sum().backward()
    for part in (encoder, connector):
        assert all(p.grad is None or p.grad.isfinite().all() for p in part.parameters())
    assert connector.parts[-1].token.grad is not None


@pytest.mark.parametrize("fit", FITS[1:], ids=["tiles", "native"])
def test_a_picture_whose_size_was_said_wrongly_is_named(
    fit: Tiles | Native, tokenizer: PreTrainedTokenizerFast
) -> None:
    contract, encoder, connector = parts(fit)
    slots = slots_of(contract, encoder.grid_out, connector.grid_out)
    with pytest.raises(DataError, match="size of the picture is not known"):
        slots(MediaRef(modality="image", sha256="a" * 64, uri="a.png"))
    album = Album()
    sample = album.sample("turned", contract, (40, 16))
    (ref,) = sample.media()
    wrong = MediaRef(modality="image", sha256=ref.sha256, uri="", width=16, height=40)  # turned by its EXIF
    turns = (Turn(role="user", parts=(wrong, Text(text="?"))), sample.turns[1])
    rendered = Template(tokenizer, placeholder=PLACEHOLDER, slots=slots).sample(Sample(id="turned", turns=turns))

    def account(grid: torch.Tensor) -> torch.Tensor:
        return connector.grid_out(encoder.grid_out(grid))

    with pytest.raises(DataError, match=r"placeholders for the picture of 16 x 40 pixels, .* media tokens") as caught:
        collate([("turned", rendered)], album.pixels, grid_out=account, encoded=False, row=500, pad=0)
    assert "sample turned, picture 1" in caught.value.place


def test_a_square_needs_no_size() -> None:
    contract, encoder, connector = parts(None)
    assert slots_of(contract, encoder.grid_out, connector.grid_out)(MediaRef(modality="image", sha256="a", uri="")) == 6
