"""Tiles stitched with ends of rows: the order and the values of LLaVA-NeXT and LLaVA-OneVision in transformers."""

from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from plait.assembly.contract import ImageContract
from plait.assembly.fit import Tiles, best_arrangement
from plait.core.tensors import Patches
from plait.models.connectors.projection import Chain, Mlp, RowEnds
from plait.models.towers.pretrained import PretrainedVision
from plait.models.towers.tiled import TiledEncoder, cut_tiles

TILE, PATCH, TILES = 12, 4, 4
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": TILE, "patch_size": PATCH}
TEXT = {"hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
POINTS = [[r * TILE, c * TILE] for r in range(1, TILES + 1) for c in range(1, TILES // r + 1)]


def next_model() -> Any:
    torch.manual_seed(0)
    text = LlamaConfig(**TEXT, num_key_value_heads=2)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text,
        image_grid_pinpoints=POINTS,
        vision_feature_layer=-2,
        image_token_index=49,
    )
    return LlavaNextForConditionalGeneration(config).eval().double()


def onevision_model() -> Any:
    torch.manual_seed(0)
    text = Qwen2Config(**TEXT, num_key_value_heads=2)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=text,
        image_grid_pinpoints=POINTS,
        vision_feature_layer=-2,
        image_token_index=49,
    )
    return LlavaOnevisionForConditionalGeneration(config).eval().double()


def ours(theirs: Any, *, layer: int) -> tuple[TiledEncoder, Chain]:
    """Their tower behind ours, and a connector with their weights."""
    model = theirs.model
    tower = PretrainedVision(model.vision_tower, layer=layer)
    projector = model.multi_modal_projector
    mlp, ends = Mlp(16, 20, 20, norm=False).double(), RowEnds(20, above=TILE // PATCH).double()
    with torch.no_grad():
        mlp.up.load_state_dict(projector.linear_1.state_dict())
        mlp.down.load_state_dict(projector.linear_2.state_dict())
        ends.token.copy_(model.image_newline)
    return TiledEncoder(tower, TILE), Chain(mlp, ends)


@pytest.mark.parametrize("size", [(TILE, 2 * TILE), (2 * TILE, 2 * TILE), (3 * TILE, TILE)])
@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_overview_and_stitched_tiles_are_theirs(kind: str, size: tuple[int, int]) -> None:
    """Pictures that fill their arrangement: there is nothing to unpad."""
    theirs = next_model() if kind == "next" else onevision_model()
    layer = -2  # the last one of SigLIP is before its last norm in theirs, after it in ours
    height, width = size
    contract = ImageContract(size=TILE, fit=Tiles(max_tiles=TILES))
    assert contract.sizes(width, height) == ((TILE, TILE), size)
    rows, columns = best_arrangement(height, width, size=TILE, most=TILES)
    torch.manual_seed(1)
    overview, whole = torch.rand(TILE, TILE, 3).double(), torch.rand(height, width, 3).double()
    tiles = cut_tiles(whole[None], TILE).view(rows * columns, TILE, TILE, 3)
    pixels = (torch.cat([overview[None], tiles]).permute(0, 3, 1, 2) - 0.5) / 0.5
    kwargs = {"vision_feature_select_strategy": "default" if kind == "next" else "full"}
    with torch.no_grad():
        (wanted,) = theirs.model.get_image_features(
            pixel_values=pixels[None], image_sizes=torch.tensor([size]), vision_feature_layer=layer, **kwargs
        ).pooler_output
        encoder, connector = ours(theirs, layer=layer)
        values = torch.cat([overview.reshape(-1, 3), whole.reshape(-1, 3)])
        found = connector(encoder(Patches(values=values, grid=torch.tensor([[1, TILE, TILE], [1, *size]]))))
    side = TILE // PATCH
    assert found.grid.tolist() == [[1, side, side], [1, rows * side, columns * side + 1]]
    torch.testing.assert_close(found.values, wanted, atol=1e-12, rtol=0)
