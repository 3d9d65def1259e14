"""Rotary codes: lengths are kept, only differences of places count, and every variant reads the axes it says."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.core.errors import ConfigError
from plait.models.attention import Attention, AttentionSizes, Places
from plait.models.position.rotary import Rotary, turned, unit_coordinates

VARIANTS: dict[str, tuple[int, Callable[[], Rotary]]] = {
    "sequence": (1, lambda: Rotary.sequence(12)),
    "grid": (2, lambda: Rotary.grid(12)),
    "alternating": (2, lambda: Rotary.grid_alternating(12)),
    "unit": (2, lambda: Rotary.unit_grid(12)),
    "multimodal": (3, lambda: Rotary.multimodal(12, (2, 2, 2))),
    "interleaved": (3, lambda: Rotary.multimodal(12, (2, 2, 2), interleaved=True)),
}


def places(name: str, *, seed: int) -> tuple[Rotary, Tensor]:
    axes, make = VARIANTS[name]
    generator = torch.Generator().manual_seed(seed)
    if name == "unit":
        return make(), torch.rand(9, axes, generator=generator) * 2 - 1
    return make(), torch.randint(0, 40, (9, axes), generator=generator)


@pytest.mark.row("S0-11")
@pytest.mark.parametrize("name", VARIANTS)
@settings(deadline=None, max_examples=15)
@given(shift=st.integers(-50, 50), seed=st.integers(0, 99))
def test_a_common_shift_changes_no_score(name: str, shift: int, seed: int) -> None:
    rotary, at = places(name, seed=seed)
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 3, 9, 12)
    step = shift * torch.arange(1, at.shape[1] + 1)  # another shift on every axis
    moved = at + (step / 50 if name == "unit" else step)
    here, there = (turned(q, rotary(where)) @ turned(k, rotary(where)).mT for where in (at, moved))
    torch.testing.assert_close(here, there, atol=3e-4, rtol=0)  # worst measured: 7e-6, of scores up to 11


@pytest.mark.row("S0-11")
@pytest.mark.parametrize("name", VARIANTS)
def test_turning_keeps_lengths_and_place_0_as_it_is(name: str) -> None:
    rotary, at = places(name, seed=0)
    x = torch.randn(1, 2, 9, 12)
    torch.testing.assert_close(turned(x, rotary(at)).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned(x, rotary(torch.zeros_like(at))), x)
    assert not torch.allclose(turned(x, rotary(at)), x, atol=0.1)


@pytest.mark.row("S0-10")
@pytest.mark.parametrize("name", ["grid", "alternating", "unit", "multimodal", "interleaved"])
def test_every_axis_is_read_by_its_own_pairs(name: str) -> None:
    rotary, at = places(name, seed=0)
    counts = torch.bincount(rotary.axis)
    assert len(counts) == at.shape[1]
    assert counts.unique().numel() == 1
    for axis in range(at.shape[1]):
        moved = at.clone()
        moved[:, axis] += 1
        changed = (rotary(moved).cos != rotary(at).cos).any(0)[:6]
        assert torch.equal(changed, rotary.axis == axis)


@pytest.mark.row("S0-10")
def test_sections_of_m_rope() -> None:
    assert Rotary.multimodal(128, (16, 24, 24)).axis.tolist() == [0] * 16 + [1] * 24 + [2] * 24
    turns = Rotary.multimodal(128, (24, 20, 20), interleaved=True).axis
    assert turns.bincount().tolist() == [24, 20, 20]
    assert turns[:6].tolist() == [0, 1, 2, 0, 1, 2]
    assert not turns[60:].any(), "time has what is left"
    with pytest.raises(ConfigError, match=r"\(1, 2, 2\) have 5 pairs, a head of 12 dimensions has 6"):
        Rotary.multimodal(12, (1, 2, 2))


@pytest.mark.row("S0-10")
@settings(deadline=None, max_examples=20)
@given(t=st.integers(1, 30), start=st.integers(0, 200))
def test_text_under_m_rope_is_text_under_rope(t: int, start: int) -> None:
    at = torch.arange(start, start + t)[:, None]
    for interleaved in (False, True):
        m_rope = Rotary.multimodal(16, (2, 3, 3), base=10_000.0, interleaved=interleaved)
        for ours, plain in zip(m_rope(at.expand(-1, 3)), Rotary.sequence(16)(at), strict=True):
            assert torch.equal(ours, plain)


def test_a_wider_head_keeps_its_other_dimensions() -> None:
    x, turn = torch.randn(1, 2, 5, 20), Rotary.sequence(12)(torch.arange(5)[:, None])
    assert torch.equal(turned(x, turn)[..., 12:], x[..., 12:])
    assert torch.equal(turned(x, turn)[..., :12], turned(x[..., :12], turn))


def test_rows_of_a_batch_have_their_own_places() -> None:
    torch.manual_seed(0)
    attention = Attention(AttentionSizes(d=16, heads=2, kv_heads=1))
    rotary, x = Rotary.sequence(8), torch.randn(2, 6, 16)
    at = torch.stack([torch.arange(6), torch.arange(6).flip(0) * 7])[..., None]
    together = attention(x, Places(turn=rotary(at))).values
    for row in range(2):
        alone = attention(x[row : row + 1], Places(turn=rotary(at[row]))).values
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20))
def test_the_unit_square_is_centered(rows: int, columns: int) -> None:
    at = unit_coordinates(rows, columns).view(rows, columns, 2)
    torch.testing.assert_close(at, -at.flip(0, 1), atol=1e-6, rtol=0)
    assert at.abs().max() < 1
    if rows > 1:
        torch.testing.assert_close(
            at[:, :, 0].diff(dim=0), torch.full((rows - 1, columns), 2 / rows), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("make", [Rotary.grid, Rotary.grid_alternating, Rotary.unit_grid])
def test_widths_that_cannot_be_turned(make: Callable[[int], Rotary]) -> None:
    with pytest.raises(ConfigError, match="6 dimensions cannot be turned in 4 equal parts"):
        make(6)
    with pytest.raises(ConfigError, match="5 dimensions"):
        Rotary.sequence(5)


def test_rotation_does_not_follow_the_weights_number_format_and_survives_meta() -> None:
    at = torch.tensor([[4000.0]])
    wanted = Rotary.sequence(64)(at)
    with torch.device("meta"):
        built = Rotary.sequence(64)
    for rotary in (Rotary.sequence(64).bfloat16(), built.to_empty(device="cpu").half()):
        assert torch.equal(rotary(at).cos, wanted.cos)
