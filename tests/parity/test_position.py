"""Position codes = those of Hugging Face's models: tables, interpolations, biases and turns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    BeitConfig,
    BertConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    LlamaConfig,
    PixtralVisionConfig,
    Qwen2VLConfig,
    Qwen3VLTextConfig,
    T5Config,
    ViTConfig,
    ViTMAEConfig,
)
from transformers.models.beit.modeling_beit import BeitRelativePositionBias
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTRopePositionEmbedding
from transformers.models.llama import modeling_llama
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings
from transformers.models.swin.modeling_swin import SwinRelativePositionBias
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.vit.modeling_vit import ViTEmbeddings
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings, build_2d_sinusoidal_position_embedding

from plait.models.position.absolute import LearnedGrid, LearnedSequence, SinCosGrid
from plait.models.position.multimodal import multimodal_coordinates
from plait.models.position.relative import BucketBias, GridBias, LinearBias, gaps
from plait.models.position.rotary import Rotary, Turn, turned, unit_coordinates

GRIDS = ((1, 1), (1, 9), (3, 3), (4, 4), (5, 2), (7, 11), (16, 16))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def line(length: int) -> Tensor:
    """Coordinates of a sequence."""
    return torch.arange(length)[:, None]


def cells(rows: int, columns: int) -> Tensor:
    """Row and column of each cell in raster order."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def same(found: Tensor, wanted: Tensor, *, atol: float = 0.0) -> None:
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


# --- absolute --------------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-09")
@pytest.mark.parametrize(("side", "d"), [(1, 4), (3, 16), (14, 64)])
def test_the_grid_of_sines_is_that_of_mae(side: int, d: int) -> None:
    # A fresh ViTMAEModel of transformers 5.23 has zeros instead: this part alone fills its table.
    theirs = ViTMAEEmbeddings(ViTMAEConfig(hidden_size=d, image_size=side, patch_size=1))
    theirs.initialize_weights()
    table = theirs.position_embeddings[0]
    same(SinCosGrid(d)(side, side), table[1:], atol=1e-6)  # worst measured: 0
    assert not table[0].any()  # of the class token, which is no cell


@pytest.mark.row("S0-09")
@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_of_sines_that_is_no_square(grid: tuple[int, int]) -> None:
    theirs = build_2d_sinusoidal_position_embedding(*grid, embed_dim=24)
    rows_first = torch.cat(SinCosGrid(24)(*grid).chunk(2, dim=1)[::-1], dim=1)
    same(rows_first, theirs, atol=1e-6)  # worst measured: 0


@pytest.mark.row("S0-08")
def test_learned_positions_are_those_of_bert() -> None:
    config = BertConfig(vocab_size=7, hidden_size=12, num_attention_heads=2, max_position_embeddings=9)
    theirs = BertEmbeddings(config).eval()
    ours = LearnedSequence(9, 12)
    ours.table.data.copy_(theirs.position_embeddings.weight)
    token_ids = torch.randint(7, (2, 6))
    summed = theirs.word_embeddings(token_ids) + theirs.token_type_embeddings.weight[0] + ours(6)
    same(theirs.LayerNorm(summed), theirs(token_ids), atol=1e-6)  # worst measured: 0


@pytest.mark.row("S0-08")
@pytest.mark.row("S2-03")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_learned_grid_is_interpolated_as_in_vit_and_dinov2(kind: str, grid: tuple[int, int]) -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    theirs = ViTEmbeddings(ViTConfig(**sizes)) if kind == "vit" else Dinov2Embeddings(Dinov2Config(**sizes))
    torch.nn.init.normal_(theirs.position_embeddings)
    ours = LearnedGrid(4, 4, 8)
    ours.table.data.copy_(theirs.position_embeddings[0, 1:])
    rows, columns = grid
    wanted = theirs.interpolate_pos_encoding(torch.zeros(1, 1 + rows * columns, 8), rows * 2, columns * 2)[0, 1:]
    same(ours(rows, columns), wanted)
    pull = torch.randn(rows * columns, 8)
    (ours(rows, columns) * pull).sum().backward()
    (wanted * pull).sum().backward()
    same(ours.table.grad, theirs.position_embeddings.grad[0, 1:])


@pytest.mark.row("S0-08")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learned_grid_is_resized_as_in_siglip2(dtype: torch.dtype) -> None:
    ours = LearnedGrid(6, 6, 8, antialias=True, mode="bilinear").to(dtype)
    table = ours.table.view(6, 6, 8)
    shapes = torch.tensor(GRIDS)
    wanted = Siglip2VisionEmbeddings.resize_positional_embeddings(table, shapes, 256)
    for (rows, columns), theirs in zip(GRIDS, wanted, strict=True):
        same(ours(rows, columns), theirs[: rows * columns])


# --- relative --------------------------------------------------------------------------------------------------------


def t5(*, decoder: bool, buckets: int, furthest: int) -> T5Attention:
    config = T5Config(
        d_model=8,
        d_kv=4,
        num_heads=2,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=furthest,
        is_decoder=decoder,
    )
    return T5Attention(config, has_relative_attention_bias=True, layer_idx=0)


@pytest.mark.row("S0-11")
@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (320, 800)])
def test_buckets_and_bias_are_those_of_t5(both_ways: bool, buckets: int, furthest: int) -> None:
    theirs = t5(decoder=not both_ways, buckets=buckets, furthest=furthest)
    ours = BucketBias(2, buckets=buckets, furthest=furthest, both_ways=both_ways)
    ours.table.data.copy_(theirs.relative_attention_bias.weight)
    gap = torch.arange(-3 * furthest, 3 * furthest + 1)
    wanted = T5Attention._relative_position_bucket(-gap, both_ways, buckets, furthest)
    assert torch.equal(ours.bucket(gap), wanted)
    bias = ours(gaps(line(9), line(13)))
    same(bias, theirs.compute_bias(9, 13))
    pull = torch.randn_like(bias)
    (bias * pull).sum().backward()
    (theirs.compute_bias(9, 13) * pull).sum().backward()
    same(ours.table.grad, theirs.relative_attention_bias.weight.grad, atol=1e-5)  # worst measured: 0


@pytest.mark.row("S0-11")
@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (2, 5), (7, 3)])
def test_the_table_of_offsets_is_that_of_swin(grid: tuple[int, int]) -> None:
    theirs = SwinRelativePositionBias(3, grid)
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    ours = GridBias(3, *grid)
    ours.table.data.copy_(theirs.relative_position_bias_table)
    gap = gaps(cells(*grid), cells(*grid))
    assert torch.equal(ours.index(gap, grid), theirs._create_relative_position_index())
    same(ours(gap), theirs())


@pytest.mark.row("S0-11")
@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (3, 3), (5, 7)])
def test_bias_with_a_class_token_is_that_of_beit_on_any_grid(grid: tuple[int, int]) -> None:
    theirs = BeitRelativePositionBias(
        BeitConfig(hidden_size=6, num_attention_heads=3, image_size=16, patch_size=4, num_hidden_layers=1)
    )
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    ours = GridBias(3, 4, 4, class_token=True)
    ours.table.data.copy_(theirs.relative_position_bias_table)
    if grid != (4, 4):
        ours = ours.resized(*grid)
    at = torch.cat([torch.zeros(1, 2, dtype=torch.long), cells(*grid)])  # the class token stands nowhere
    same(ours(gaps(at, at)), theirs(grid))


@pytest.mark.row("S0-11")
@pytest.mark.parametrize("heads", [1, 2, 8, 16])
def test_slopes_are_those_of_bloom_and_mpt(heads: int) -> None:
    length = 11
    ours = LinearBias(heads)(gaps(line(length), line(length)))[0]
    bloom = build_alibi_tensor(torch.ones(1, length, dtype=torch.long), heads, torch.float32)
    mpt = build_mpt_alibi_tensor(heads, length)
    # Theirs count from the first or the last key; a softmax does not see that, and causal queries see the past only.
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    for theirs in (bloom, mpt):
        softmax = theirs.expand(-1, length, -1).masked_fill(~seen, float("-inf")).softmax(-1)
        same(ours.masked_fill(~seen, float("-inf")).softmax(-1), softmax, atol=1e-6)  # worst measured: 9e-8
    same(ours[:, -1], mpt[:, 0])  # from the last query on the distances are the same


# --- rotary ----------------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-11")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turns_are_those_of_llama(dtype: torch.dtype) -> None:
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    theirs = modeling_llama.LlamaRotaryEmbedding(config)
    q, k = torch.randn(3, 2, 40, 16, dtype=dtype), torch.randn(3, 1, 40, 16, dtype=dtype)
    at = torch.randint(0, 4000, (3, 40))
    cos, sin = theirs(q, at)
    turn = Rotary.sequence(16, base=5e5)(at[..., None])
    same(turn.cos, theirs(q.float(), at)[0], atol=5e-4)  # worst measured: 6e-5, at angles of 4000 radians
    wanted = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    for ours, their in zip((turned(q, Turn(cos, sin)), turned(k, Turn(cos, sin))), wanted, strict=True):
        same(ours, their)
    near = Rotary.sequence(16, base=5e5)(at[..., None] % 100)
    wanted = modeling_llama.apply_rotary_pos_emb(q, k, *theirs(q, at % 100))
    for ours, their in zip((turned(q, near), turned(k, near)), wanted, strict=True):
        same(ours, their, atol=1e-4 if dtype == torch.float32 else 0.04)  # worst measured: 7e-6 and 0


@pytest.mark.row("S0-10")
@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 9)])
def test_turns_of_a_grid_are_those_of_qwen2_vl(grid: tuple[int, int]) -> None:
    config = Qwen2VLConfig(vision_config={"embed_dim": 32, "num_heads": 2, "depth": 1}).vision_config
    theirs = modeling_qwen2_vl.Qwen2VLVisionRotaryEmbedding(config)
    at = cells(*grid)
    cos, sin = theirs(torch.zeros(1), at)
    turn = Rotary.grid(16)(at)
    same(turn.cos, cos, atol=1e-6)  # worst measured: 0
    same(turn.sin, sin, atol=1e-6)
    q, k = torch.randn(2, len(at), 2, 16)
    wanted = modeling_qwen2_vl.apply_rotary_pos_emb_vision(q, k, cos, sin)
    for x, their in zip((q, k), wanted, strict=True):
        same(turned(x.transpose(0, 1)[None], turn)[0].transpose(0, 1), their, atol=1e-5)  # worst measured: 0


@pytest.mark.row("S0-10")
@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 9)])
def test_alternating_turns_are_those_of_pixtral(grid: tuple[int, int]) -> None:
    config = PixtralVisionConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, image_size=64, patch_size=4
    )
    cos, sin = PixtralVisionRotaryEmbedding(config)(torch.zeros(1), cells(*grid))
    turn = Rotary.grid_alternating(16)(cells(*grid))
    same(turn.cos, cos, atol=1e-6)  # worst measured: 3e-8
    same(turn.sin, sin, atol=1e-6)


@pytest.mark.row("S0-10")
@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 9)])
def test_turns_of_the_unit_square_are_those_of_dinov3(grid: tuple[int, int]) -> None:
    config = DINOv3ViTConfig(hidden_size=32, num_attention_heads=2, patch_size=2, image_size=8)
    theirs = DINOv3ViTRopePositionEmbedding(config).eval()
    cos, sin = theirs(torch.zeros(1, 3, grid[0] * 2, grid[1] * 2))
    turn = Rotary.unit_grid(16)(unit_coordinates(*grid))
    same(turn.cos, cos, atol=2e-6)  # worst measured: 1.2e-7
    same(turn.sin, sin, atol=2e-6)


# --- M-RoPE ----------------------------------------------------------------------------------------------------------

Parts = list[int | tuple[int, int, int]]

SEQUENCES: list[Parts] = [
    [3, (1, 2, 2), 4],
    [(1, 1, 1)],
    [1, (1, 5, 2), 2, (1, 3, 7), 1],
    [2, (1, 4, 4), (2, 2, 3), 3],
    [4, (3, 3, 2), 1],
]


def theirs_of(parts: Parts) -> Tensor:
    """Hugging Face's coordinates; media of one frame are pictures, of more are videos; merged 2 x 2."""
    config = Qwen2VLConfig(
        vision_config={"embed_dim": 8, "num_heads": 2, "depth": 1, "spatial_merge_size": 2},
        text_config={
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 1,
            "intermediate_size": 8,
            "vocab_size": 9,
        },
    )
    with torch.device("meta"):
        model = modeling_qwen2_vl.Qwen2VLModel(config)
    kinds: list[int] = []
    grids: dict[int, list[list[int]]] = {1: [], 2: []}
    for part in parts:
        if isinstance(part, int):
            kinds += [0] * part
        else:
            frames, rows, columns = part
            kind = 1 if frames == 1 else 2
            kinds += [kind] * (frames * rows * columns)
            grids[kind].append([frames, rows * 2, columns * 2])
    ids = torch.zeros(1, len(kinds), dtype=torch.long)
    pictures, videos = (torch.tensor(found) if found else None for found in grids.values())
    at, _ = model.get_rope_index(ids, torch.tensor([kinds]), image_grid_thw=pictures, video_grid_thw=videos)
    return at[:, 0].T


@pytest.mark.row("S0-10")
@pytest.mark.parametrize("parts", SEQUENCES, ids=str)
def test_coordinates_are_those_of_qwen2_vl(parts: Parts) -> None:
    assert torch.equal(multimodal_coordinates(parts), theirs_of(parts))


@pytest.mark.row("S0-10")
def test_more_frames_than_rows_follow_the_paper() -> None:
    """The paper goes on above the largest number so far; transformers 5.23 looks at rows and columns only."""
    found = multimodal_coordinates([1, (5, 2, 2), 1])
    assert found[-1].tolist() == [6, 6, 6]
    assert theirs_of([1, (5, 2, 2), 1])[-1].tolist() == [3, 3, 3]  # inside the video's time
    assert torch.equal(found[:-1], theirs_of([1, (5, 2, 2), 1])[:-1])


@pytest.mark.row("S0-10")
@pytest.mark.parametrize("parts", SEQUENCES, ids=str)
def test_multimodal_turns_are_those_of_qwen2_vl_and_qwen3_vl(parts: Parts) -> None:
    at = multimodal_coordinates(parts)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
    qwen2 = Qwen2VLConfig(text_config={**sizes, "rope_parameters": {**rope, "mrope_section": [4, 6, 6]}}).text_config
    qwen3 = Qwen3VLTextConfig(**sizes, rope_parameters={**rope, "mrope_section": [6, 5, 5]})
    blocks = modeling_qwen2_vl.Qwen2VLRotaryEmbedding(qwen2)(torch.zeros(1), at.T[:, None])
    turns = Qwen3VLTextRotaryEmbedding(qwen3)(torch.zeros(1), at.T[:, None])
    ours = Rotary.multimodal(32, (4, 6, 6))(at), Rotary.multimodal(32, (6, 5, 5), interleaved=True)(at)
    for turn, (cos, sin) in zip(ours, (blocks, turns), strict=True):
        same(turn.cos, cos[0], atol=1e-6)  # worst measured: 1.2e-7
        same(turn.sin, sin[0], atol=1e-6)
