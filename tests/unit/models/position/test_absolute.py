"""Absolute position codes: closed forms, and what makes them codes of a place."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.errors import ConfigError, DataError
from plait.models.position.absolute import LearnedGrid, LearnedRowColumn, LearnedSequence, SinCosGrid, SinCosSequence


@pytest.mark.row("S0-07")
@pytest.mark.parametrize(("d", "base"), [(2, 10_000.0), (6, 10_000.0), (16, 100.0)])
def test_the_closed_form_of_the_paper(d: int, base: float) -> None:
    found = SinCosSequence(d, base=base)(30)
    for p in range(30):
        for i in range(d // 2):
            angle = p / base ** (2 * i / d)
            # float32 holds numbers near 1 to 6e-8
            assert abs(float(found[p, 2 * i]) - math.sin(angle)) < 6.1e-8
            assert abs(float(found[p, 2 * i + 1]) - math.cos(angle)) < 6.1e-8


@pytest.mark.row("S0-07")
def test_far_positions_keep_their_digits() -> None:
    found = SinCosSequence(8)(100_001)[100_000, 0]
    assert abs(float(found) - math.sin(100_000.0)) < 6.1e-8  # angles in float32 would be 4e-3 off


@pytest.mark.row("S0-07")
@settings(deadline=None, max_examples=30)
@given(p=st.integers(0, 500), k=st.integers(0, 500), interleaved=st.booleans())
def test_a_step_is_one_rotation_wherever_it_is_taken(p: int, k: int, interleaved: bool) -> None:
    d, pairs = 12, 6
    code = SinCosSequence(d, interleaved=interleaved)
    table = code(p + k + 1).double()
    sines = torch.arange(0, d, 2) if interleaved else torch.arange(pairs)
    cosines = sines + (1 if interleaved else pairs)
    step = torch.zeros(d, d, dtype=torch.float64)
    angle = k * code.frequency
    step[sines, sines], step[sines, cosines] = angle.cos(), angle.sin()
    step[cosines, sines], step[cosines, cosines] = -angle.sin(), angle.cos()
    torch.testing.assert_close(step @ table[p], table[p + k], atol=5e-7, rtol=0)  # worst measured: 6e-8
    torch.testing.assert_close(step @ step.T, torch.eye(d, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.row("S0-07")
@settings(deadline=None, max_examples=30)
@given(p=st.integers(0, 300), q=st.integers(0, 300), shift=st.integers(0, 300))
def test_the_dot_product_sees_only_the_offset(p: int, q: int, shift: int) -> None:
    table = SinCosSequence(32)(601)
    torch.testing.assert_close(table[p] @ table[q], table[p + shift] @ table[q + shift], atol=1e-5, rtol=0)
    expected = (abs(p - q) * SinCosSequence(32).frequency).cos().sum().float()
    torch.testing.assert_close(table[p] @ table[q], expected, atol=1e-5, rtol=0)  # worst measured: 2e-6


@pytest.mark.row("S0-07")
def test_a_longer_code_begins_with_the_shorter_one() -> None:
    code = SinCosSequence(10, interleaved=False)
    assert torch.equal(code(50)[:7], code(7))
    assert not code.state_dict(), "nothing of it is learned or saved"


@pytest.mark.row("S0-09")
def test_the_nearest_cells_in_the_code_are_the_neighbors_in_the_grid() -> None:
    rows, columns = 9, 12
    table = SinCosGrid(64)(rows, columns)
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    steps = (at[:, None] - at[None]).abs().sum(-1)
    apart = torch.cdist(table, table)
    for cell in range(len(at)):
        beside, beyond = apart[cell][steps[cell] == 1], apart[cell][steps[cell] > 2]
        assert beside.max() < beyond.min()


@pytest.mark.row("S0-09")
def test_row_and_column_are_read_linearly() -> None:
    rows, columns = 14, 20
    table = SinCosGrid(64)(rows, columns).double()
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    parity = at.sum(1) % 2 == 0  # every other cell teaches the probe, the rest ask it
    inputs = torch.cat([table, torch.ones(len(table), 1, dtype=torch.float64)], dim=1)
    penalty = 1e-4 * torch.eye(inputs.shape[1], dtype=torch.float64)
    seen = inputs[parity]
    probe = torch.linalg.solve(seen.T @ seen + penalty, seen.T @ at[parity].double())
    read = inputs[~parity] @ probe
    assert (read.round() == at[~parity]).all()  # worst measured: 0.01 cells off


@pytest.mark.row("S0-09")
def test_rows_and_columns_have_their_own_halves() -> None:
    table = SinCosGrid(16)(3, 5).view(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])
    assert torch.equal(table[:, 0, 8:], SinCosSequence(8, interleaved=False)(3))


def test_widths_that_cannot_be_coded() -> None:
    with pytest.raises(ConfigError, match="even width, came 5"):
        SinCosSequence(5)
    with pytest.raises(ConfigError, match="4 divides, came 6"):
        SinCosGrid(6)


@pytest.mark.row("S0-08")
def test_learned_positions_end_somewhere() -> None:
    code = LearnedSequence(4, 6)
    assert torch.equal(code(3), code.table[:3])
    with pytest.raises(DataError, match="5 tokens, 4 learned positions"):
        code(5)
    code(2).sum().backward()
    assert code.table.grad is not None
    assert code.table.grad[:2].eq(1).all()
    assert code.table.grad[2:].eq(0).all(), "unused positions do not move"


@pytest.mark.row("S0-08")
def test_a_resized_sequence_goes_through_what_was_learned() -> None:
    code = LearnedSequence(4, 2)
    code.table.data.copy_(torch.arange(8.0).view(4, 2))
    assert torch.equal(code.resized(4).table, code.table)
    # Centers of 8 cells over 4: the ends are held, between them it is linear.
    wanted = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0])[:, None] * 2 + torch.tensor([0.0, 1.0])
    torch.testing.assert_close(code.resized(8)(8), wanted)
    assert code.resized(8).table.requires_grad
    assert code.resized(2).to(torch.bfloat16).resized(9).table.dtype == torch.bfloat16


@pytest.mark.row("S0-08")
@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), mode=st.sampled_from(["bicubic", "bilinear"]))
def test_interpolation_keeps_what_is_the_same_everywhere(rows: int, columns: int, mode: str) -> None:
    code = LearnedGrid(5, 3, 2, mode=mode)
    with torch.no_grad():
        code.table.copy_(torch.tensor([2.0, -3.0]))
        found = code(rows, columns)
    torch.testing.assert_close(found, torch.tensor([2.0, -3.0]).expand(rows * columns, 2), atol=1e-5, rtol=0)


@pytest.mark.row("S0-08")
def test_the_learned_grid_itself_is_the_table_and_turning_it_turns_the_result() -> None:
    code = LearnedGrid(4, 6, 3)
    assert code(4, 6) is code.table
    flipped = LearnedGrid(4, 6, 3)
    flipped.table.data.copy_(code.table.view(4, 6, 3).flip(0, 1).flatten(0, 1))
    found, mirrored = code(9, 7).view(9, 7, 3), flipped(9, 7).view(9, 7, 3)
    torch.testing.assert_close(mirrored.flip(0, 1), found, atol=1e-6, rtol=0)


@pytest.mark.row("S0-09")
def test_rows_plus_columns() -> None:
    code = LearnedRowColumn(3, 4, 5)
    assert sum(p.numel() for p in code.parameters()) == (3 + 4) * 5
    table = code(3, 4).view(3, 4, 5)
    for r in range(3):
        for c in range(4):
            assert torch.equal(table[r, c], code.rows[r] + code.columns[c])
    larger = code(6, 4).view(6, 4, 5)
    torch.testing.assert_close(larger[0] - larger[5], (code.rows[0] - code.rows[2]).expand(4, 5))
    torch.testing.assert_close(larger[:, 1] - larger[:, 0], (code.columns[1] - code.columns[0]).expand(6, 5))
