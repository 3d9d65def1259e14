"""Cached gradients: those of the whole batch in one piece, whatever the micro-batches and ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.training.pairwise_model import PAIRS, SOUNDS, distance, dual, gradients, gradients_and_sums, pairs
from torch import nn

from plait.core.errors import ConfigError
from plait.core.launch import free_port
from plait.core.protocols import Pairwise
from plait.core.tensors import IGNORE, Batch, Embedded, Patches
from plait.objectives.contrastive import Contrastive, SigmoidContrastive
from plait.objectives.matching import QueryTasks
from plait.training import contrast
from plait.training.gradient import accumulate, check_batches

BOUNDS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def objective(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    return Contrastive(**settings) if kind == "nce" else SigmoidContrastive(bias=-2.0, **settings).to(dtype)


def cut(batch: Batch, sizes: list[int]) -> list[Batch]:
    """The same rows in pieces of the given sizes."""
    pieces, at = [], 0
    for size in sizes:
        media, item_row = {}, {}
        for name, row in batch.item_row.items():
            here = (row >= at) & (row < at + size)
            if here.any():
                media[name] = Patches(values=batch.media[name].values[here], grid=batch.media[name].grid[here])
                item_row[name] = row[here] - at
        part = slice(at, at + size)
        pieces.append(
            replace(
                batch,
                token_ids=batch.token_ids[part],
                labels=batch.labels[part],
                segment_ids=batch.segment_ids[part],
                media=media,
                item_row=item_row,
                sample_ids=batch.sample_ids[part],
            )
        )
        at += size
    return pieces


@st.composite
def splits(draw: Any) -> list[int]:
    sizes, left = [], PAIRS
    while left:
        sizes.append(draw(st.integers(1, left)))
        left -= sizes[-1]
    return sizes


# --- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.row("S2-26")
@pytest.mark.row("S3-23")
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("kind", ["nce", "sigmoid"])
@settings(deadline=None, max_examples=25)
@given(sizes=splits(), seed=st.integers(0, 100))
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    kind: str, dtype: torch.dtype, bound: float, sizes: list[int], seed: int
) -> None:
    # Worst of 60 splits measured: 7.6e-16 and 4.9e-7.
    model, loss = dual(seed=seed, dtype=dtype), objective(kind, dtype)
    (whole,) = pairs(seed=seed, dtype=dtype).step_batches(0)
    expected, at_once = gradients_and_sums(model, loss, [whole])
    found, in_parts = gradients_and_sums(model, loss, cut(whole, sizes))
    assert distance(found, expected) <= bound
    learned = ["log_scale", *(["objective.bias"] if kind == "sigmoid" else [])]
    for name in learned:  # counted once, not once a micro-batch
        assert float(expected[name].abs()) > 0
        torch.testing.assert_close(found[name], expected[name], rtol=100 * bound, atol=bound)
    assert (
        in_parts.counts
        == at_once.counts
        == {
            "contrastive": PAIRS,
            "contrastive-image-audio": SOUNDS,
            "contrastive-text-audio": SOUNDS,
        }
    )
    assert in_parts.loss == pytest.approx(at_once.loss, rel=bound)


def test_losses_of_the_parts_would_fail_the_same_bound() -> None:
    model = dual()
    (whole,) = pairs().step_batches(0)
    expected = gradients(model, Contrastive(), [whole])
    parts = [gradients(model, Contrastive(), [piece]) for piece in cut(whole, [7, 7])]
    assert distance({name: (parts[0][name] + parts[1][name]) / 2 for name in expected}, expected) > 0.1


@pytest.mark.row("S2-26")
@pytest.mark.parametrize("kind", ["nce", "sigmoid"])
@pytest.mark.parametrize("cells", [1, 3 * PAIRS, PAIRS**2 - 1])
def test_blocks_of_rows_give_the_same_value_and_gradient(kind: str, cells: int) -> None:
    model, (whole,) = dual(), pairs().step_batches(0)
    expected, at_once = gradients_and_sums(model, objective(kind), [whole])
    for sizes in ([PAIRS], [5, 9]):
        found, in_blocks = gradients_and_sums(model, objective(kind, cells=cells), cut(whole, sizes))
        assert distance(found, expected) <= 1e-10
        assert in_blocks.loss == pytest.approx(at_once.loss, rel=1e-12)


@pytest.mark.parametrize("kind", ["nce", "sigmoid"])
@given(first=st.integers(0, PAIRS), classes=st.lists(st.integers(0, 3), min_size=PAIRS, max_size=PAIRS))
@settings(deadline=None, max_examples=25)
def test_sums_over_rows_add_up(kind: str, first: int, classes: list[int]) -> None:
    loss, (whole,) = objective(kind), pairs().step_batches(0)
    whole = replace(whole, labels=torch.tensor([c if c else IGNORE for c in classes])[:, None])
    with torch.no_grad():
        found = loss.embed(dual(), whole)
        every, one, other = (
            loss.loss(found),
            loss.loss(found, rows=range(first)),
            loss.loss(found, rows=range(first, PAIRS)),
        )
    for name, value in every.items():
        torch.testing.assert_close(one[name] + other[name], value, rtol=1e-12, atol=1e-12)


# --- random numbers, buffers, memory -------------------------------------------------------------------------------


def test_both_passes_drop_the_same_units() -> None:
    # Each micro-batch with its own masks is a function of the weights: cached gradients must be its gradient.
    model, loss = dual(dropout=0.4), Contrastive()
    pieces = cut(pairs().step_batches(0)[0], [5, 6, 3])

    def in_one_graph() -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        parts = [loss.embed(model, piece) for piece in pieces]
        whole = contrast.join(parts)
        model.zero_grad(set_to_none=True)
        sums = loss.loss(whole)
        weights = {
            "contrastive": 1 / PAIRS,
            "contrastive-image-audio": 1 / SOUNDS,
            "contrastive-text-audio": 0.3 / SOUNDS,
        }
        sum(weight * sums[name] for name, weight in weights.items()).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    expected, after = in_one_graph(), torch.get_rng_state()
    torch.manual_seed(7)
    found = gradients(model, loss, pieces)
    assert distance(found, expected) <= 1e-10
    assert torch.equal(torch.get_rng_state(), after)  # as if there had been one pass
    torch.manual_seed(7)
    again = gradients(model, loss, pieces)
    assert all(torch.equal(again[name], found[name]) for name in found)
    torch.manual_seed(8)
    assert distance(gradients(model, loss, pieces), found) > 0.01


def test_a_model_that_embeds_otherwise_again_is_refused() -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dual, self.calls = dual(), 0

        def forward(self, batch: Batch) -> Any:
            self.calls += 1
            found = self.dual(batch)
            return found._replace(image=found.image * (1 + 0.1 * self.calls))

    with pytest.raises(ConfigError, match="embedded again gave other image vectors") as caught:
        gradients(Restless(), Contrastive(), cut(pairs().step_batches(0)[0], [7, 7]))
    assert "s" in caught.value.place


@pytest.mark.row("S2-26")
def test_running_means_move_once_and_batch_norm_is_the_exception() -> None:
    pieces = cut(pairs().step_batches(0)[0], [5, 6, 3])
    model, twin = dual(batch_norm=True), dual(batch_norm=True)
    found = gradients(model, Contrastive(), pieces)
    with torch.no_grad():
        for piece in pieces:
            twin(piece)
    moved = dict(twin.named_buffers())
    assert int(moved["image.1.num_batches_tracked"]) == 3
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, moved[name]), name
    # Its statistics are those of a micro-batch: frozen it is exact, in training mode it cannot be.
    whole = pairs().step_batches(0)
    assert distance(found, gradients(dual(batch_norm=True), Contrastive(), whole)) > 1e-3
    model.image[1].eval()
    assert distance(gradients(model, Contrastive(), pieces), gradients(model, Contrastive(), whole)) <= 1e-10


def peak_bytes(model: nn.Module, loss: Any, micro: list[Batch]) -> int:
    """Most bytes that graphs hold at once, weights and inputs left out: counted by what autograd saves."""
    known = {w.untyped_storage().data_ptr() for w in model.parameters()}
    known |= {media.values.untyped_storage().data_ptr() for batch in micro for media in batch.media.values()}
    held: dict[int, list[int]] = {}
    peak = 0

    class Saved:
        def __init__(self, value: torch.Tensor) -> None:
            nonlocal peak
            self.value, self.at = value, value.untyped_storage().data_ptr()
            if self.at not in known:
                held.setdefault(self.at, [value.untyped_storage().nbytes(), 0])[1] += 1
                peak = max(peak, sum(size for size, _ in held.values()))

        def __del__(self) -> None:
            if self.at in held:
                held[self.at][1] -= 1
                if not held[self.at][1]:
                    del held[self.at]

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
        gradients(model, loss, micro)
    return peak


@pytest.mark.row("S2-26")
def test_only_one_micro_batch_is_held() -> None:
    torch.manual_seed(0)
    deep = [nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(6, 6), nn.GELU())), nn.Linear(6, 5)) for _ in "ab"]
    from plait.models.dual import DualEncoder

    model = DualEncoder(*deep)
    batches = [b.step_batches(0) for b in (big(512), big(512, micro_batch=32))]
    whole, parts = (peak_bytes(model, Contrastive(cells=16 * 512), micro) for micro in batches)
    assert parts < 0.25 * whole, (parts, whole)
    assert whole - parts > 0.9 * (whole - whole / 16) - 4 * 16 * 512 * 4, (parts, whole)


@pytest.mark.row("S2-26")
def test_blocks_of_rows_hold_a_part_of_the_table() -> None:
    from plait.models.dual import DualEncoder

    torch.manual_seed(0)
    model, batch = DualEncoder(nn.Linear(6, 5), nn.Linear(6, 5)), big(1024).step_batches(0)
    whole, parts = (peak_bytes(model, Contrastive(cells=cells), batch) for cells in (1024**2, 32 * 1024))
    assert whole > 2 * 4 * 1024**2  # both tables of log-probabilities, at least
    assert parts < 0.1 * whole, (parts, whole)


def big(number: int, **changes: int) -> Any:
    from plait.data.pair_batches import PairBatches

    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, number, 6, generator=generator)
    return PairBatches(
        image=image,
        text=text,
        texts_of=[(i,) for i in range(number)],
        classes=torch.arange(number),
        ids=[str(i) for i in range(number)],
        batch_size=number,
        seed=0,
        **changes,
    )


# --- what is refused, and what is not ------------------------------------------------------------------------------


def test_who_can_be_cut() -> None:
    pieces = cut(pairs().step_batches(0)[0], [7, 7])
    for loss in (Contrastive(), SigmoidContrastive()):
        assert isinstance(loss, Pairwise)
        check_batches(pieces, loss, step=0)
    assert not isinstance(QueryTasks(), Pairwise)
    with pytest.raises(ConfigError, match="QueryTasks compares all rows"):
        check_batches(pieces, QueryTasks(), step=0)


def test_a_loss_that_is_not_finite_sends_nothing_back_and_names_its_micro_batch() -> None:
    pieces = cut(pairs().step_batches(0)[0], [5, 6, 3])
    pieces[1].media["image"].values[0] = float("nan")
    model = dual()
    found, sums = gradients_and_sums(model, Contrastive(), pieces)
    assert not math.isfinite(sums.loss)
    assert not sums.complete
    assert sums.not_finite == pieces[1].sample_ids
    assert all(not g.any() for g in found.values())


def test_a_scaled_loss_that_is_not_finite_sends_nothing_back_either() -> None:
    pieces = cut(pairs().step_batches(0)[0], [5, 6, 3])
    assert gradients_and_sums(dual(), Contrastive(), pieces, scale=2.0**16)[1].complete
    found, sums = gradients_and_sums(dual(), Contrastive(), pieces, scale=1.7e308)
    assert math.isfinite(sums.loss)
    assert not sums.complete
    assert all(not g.any() for g in found.values())


def test_a_model_that_does_not_learn_is_refused() -> None:
    model = dual().requires_grad_(False)
    with pytest.raises(ConfigError, match="reaches no trainable weight"):
        accumulate(model, Contrastive(), cut(pairs().step_batches(0)[0], [7, 7]), weights={})


def test_vectors_without_a_gradient_take_part() -> None:
    class Queue(Contrastive):
        """Texts come from a side that does not learn, as the keys of a momentum encoder do."""

        def embed(self, model: nn.Module, batch: Batch) -> Embedded:
            found = super().embed(model, batch)
            return replace(found, vectors={**found.vectors, "text": found.vectors["text"].detach()})

    model, (whole,) = dual(), pairs().step_batches(0)
    expected = gradients(model, Queue(), [whole])
    assert not expected["text.0.weight"].any()
    assert distance(gradients(model, Queue(), cut(whole, [4, 10])), expected) <= 1e-10


def test_bfloat16_takes_the_same_way() -> None:
    model = dual(dtype=torch.float32)
    (whole,) = pairs(dtype=torch.float32).step_batches(0)

    def around() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    expected = gradients(model, Contrastive(), [whole], around=around)
    assert distance(gradients(model, Contrastive(), cut(whole, [5, 9]), around=around), expected) < 0.03


# --- several processes ---------------------------------------------------------------------------------------------

WORKER = """
import json, multiprocessing, os, sys
from pathlib import Path
import torch
from plait.core import collectives, mesh
from plait.objectives.contrastive import Contrastive, SigmoidContrastive
from pairwise_model import dual, gradients_and_sums, pairs

folder, worlds, cases = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])

def work(rank, world, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = {}
    with mesh.joined():
        for kind, dtype, micro in cases:
            kind_of = getattr(torch, dtype)
            loss = Contrastive() if kind == "nce" else SigmoidContrastive(bias=-2.0).to(kind_of)
            here = pairs(dtype=kind_of, micro_batch=micro, rank=rank, world=world, batch_size=13)
            gradient, sums = gradients_and_sums(dual(dtype=kind_of), loss, here.step_batches(0))
            found[f"{kind} {dtype} {micro}"] = [
                {n: g.tolist() for n, g in gradient.items()}, sums.loss, dict(sums.terms), dict(sums.counts)
            ]
        parts = collectives.all_gather(torch.full((rank, 2), float(rank)))
        assert [len(part) for part in parts] == list(range(world)), parts
        assert collectives.all_gather(torch.zeros(0, 3))[-1].shape == (0, 3)
        assert collectives.all_gather_text("a" * rank + "\u00e9") == ["a" * r + "\u00e9" for r in range(world)]
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found))

fork = multiprocessing.get_context("fork")  # torch is imported once
for world, port in worlds:
    ranks = [fork.Process(target=work, args=(rank, world, port)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * world
"""

CASES = [(k, d, m) for k in ("nce", "sigmoid") for d in ("float64", "float32") for m in (0, 2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What 2 and 4 real processes find, over gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    worlds = [(world, free_port()) for world in (2, 4)]
    subprocess.run(
        [sys.executable, "-c", WORKER, str(folder), json.dumps(worlds), json.dumps(CASES)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=120,
        check=True,
    )
    return {w: [json.loads((folder / f"{w}-{rank}.json").read_text()) for rank in range(w)] for w, _ in worlds}


@pytest.mark.row("S2-26")
@pytest.mark.row("S3-23")
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_gradient_of_one_process(world: int, ranks: dict[int, list[dict[str, Any]]]) -> None:
    """13 pairs of which some have sounds: unequal parts, and micro-batches and a rank without a sound."""
    for kind, dtype, micro in CASES:
        form = getattr(torch, dtype)
        bound = dict(BOUNDS)[form]
        whole = pairs(dtype=form, batch_size=13).step_batches(0)
        expected, at_once = gradients_and_sums(dual(dtype=form), objective(kind, form), whole)
        for rank in ranks[world]:
            gradient, loss, terms, counts = rank[f"{kind} {dtype} {micro}"]
            found = {name: torch.tensor(value, dtype=form) for name, value in gradient.items()}
            assert distance(found, expected) <= bound
            # Default flags of a peer give 1 / world of the gradient; a factor on each rank would give world times it.
            torch.testing.assert_close(found["log_scale"], expected["log_scale"], rtol=100 * bound, atol=bound)
            assert loss == pytest.approx(at_once.loss, rel=bound)
            assert terms == pytest.approx(dict(at_once.terms), rel=bound)
            assert counts == dict(at_once.counts)
