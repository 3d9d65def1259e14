"""Masks, wrong answers and losses of wav2vec 2.0 in closed form; a small tower that learns its task."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

from plait.core.errors import DataError
from plait.core.tensors import Batch, Patches
from plait.models.towers.wav2vec import Wav2Vec, Wav2VecSizes
from plait.models.towers.wav2vec_pretraining import SpeechTaskSizes, Wav2VecPretraining
from plait.models.transformer import TransformerSizes
from plait.objectives.seeded import drawn_from
from plait.objectives.speech import MaskedSpeech, code_diversity, masked_contrast, other_steps, span_mask


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def runs(mask: Tensor) -> list[int]:
    """Lengths of what is masked in one piece."""
    return [len(part) for part in "".join("x" if m else " " for m in mask.tolist()).split()]


@pytest.mark.row("S4-41")
@given(
    st.lists(st.integers(4, 60), max_size=4), st.integers(1, 4), st.floats(0, 1), st.integers(0, 2), st.integers(0, 9)
)
def test_spans_are_whole_and_inside_their_sounds(lengths, span, starts, at_least, seed):
    sizes = torch.tensor(lengths, dtype=torch.long)
    mask = span_mask(sizes, starts=starts, span=span, generator=seeded(seed), at_least=at_least)
    assert len(mask) == sum(lengths)
    for part in mask.split(lengths):
        assert all(run >= span for run in runs(part))
        assert int(part.sum()) >= (span if at_least else 0)
        spans = max(at_least, math.ceil(starts * len(part)))
        assert int(part.sum()) <= spans * span
    assert torch.equal(mask, span_mask(sizes, starts=starts, span=span, generator=seeded(seed), at_least=at_least))


@pytest.mark.row("S4-41")
def test_as_much_is_masked_as_theory_and_transformers_say():
    n, span, starts, draws = 60, 10, 0.065, 600
    mask = span_mask(torch.tensor([n] * draws), starts=starts, span=span, generator=seeded(0), at_least=0)
    # 3.9 spans: 3 or 4 of the 51 places. A step is bare if none of the starts that reach it is chosen.
    bare = 0.0
    for at in range(n):
        reach = min(at, n - span) - max(at - span + 1, 0) + 1
        for number, chance in ((3, 0.1), (4, 0.9)):
            bare += chance * math.comb(n - span + 1 - reach, number) / math.comb(n - span + 1, number) / n
    assert mask.float().mean().item() == pytest.approx(1 - bare, abs=0.01)
    theirs = torch.cat([torch.from_numpy(_compute_mask_indices((20, n), starts * span, span)) for _ in range(30)])
    assert mask.float().mean().item() == pytest.approx(theirs.float().mean().item(), abs=0.03)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 20))
def test_wrong_answers_are_other_masked_steps_of_the_same_sound(lengths, count, seed):
    masked = torch.rand(sum(lengths), generator=seeded(seed)) < 0.5
    for part in masked.split(lengths):
        part[:2] = True  # a single masked step has no others
    others = other_steps(masked, torch.tensor(lengths), count=count, generator=seeded(seed))
    assert others.shape == (int(masked.sum()), count)
    sound = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[masked]
    assert (sound[others] == sound[:, None]).all()
    assert (others != torch.arange(len(others))[:, None]).all()


def test_wrong_answers_are_drawn_evenly():
    others = other_steps(torch.ones(4, dtype=torch.bool), torch.tensor([4]), count=9000, generator=seeded(0))
    shares = torch.stack([torch.bincount(row, minlength=4) / 9000 for row in others])
    torch.testing.assert_close(shares, (1 - torch.eye(4)) / 3, atol=0.02, rtol=0)


def test_contrast_in_closed_form():
    eye = torch.eye(3, dtype=torch.float64)
    codes = torch.tensor([[0, 1], [0, 2], [0, 2]])
    others = torch.tensor([[1, 2, 1], [0, 2, 0], [1, 1, 1]])
    # Cosines 1 and 0 at temperature 1/2: e^2 against three, two (one has the right codes) and no wrong answers.
    found = masked_contrast(5 * eye, eye, others, codes=codes, temperature=0.5)
    assert found.item() == pytest.approx(sum(math.log(1 + k * math.exp(-2)) for k in (3, 2, 0)))
    predicted = torch.randn(3, 3, dtype=torch.float64, generator=seeded(0), requires_grad=True)
    torch.autograd.gradcheck(lambda p: masked_contrast(p, eye, others, codes=codes), predicted)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9))
def test_diversity_of_even_and_single_codes(groups, codes, count):
    n = torch.tensor(float(count), dtype=torch.float64)
    even = torch.full((groups, codes), count / codes, dtype=torch.float64)
    assert code_diversity(even, n).item() == pytest.approx(0, abs=1e-9)
    single = torch.zeros(groups, codes, dtype=torch.float64)
    single[:, 0] = count
    single.requires_grad_()
    loss = code_diversity(single, n)
    assert loss.item() == pytest.approx(count * (1 - 1 / codes))
    loss.backward()
    assert single.grad is not None
    assert single.grad.isfinite().all()


def test_impossible_masks_are_refused():
    with pytest.raises(DataError, match=r"3 time steps, a span 4 .* sound 1"):
        span_mask(torch.tensor([9, 3]), starts=0.1, span=4, generator=seeded(0))
    masked = torch.tensor([True, True, False, True])
    with pytest.raises(DataError, match=r"one masked step.* sound 1"):
        other_steps(masked, torch.tensor([2, 2]), count=3, generator=seeded(0))


def test_chance_is_a_function_of_seed_and_samples():
    batches = ((0, ["a", "b"]), (0, ["a", "b"]), (1, ["a", "b"]), (0, ["b", "a"]), (0, ["ab"]))
    draws = [torch.rand((), generator=drawn_from(seed, ids)).item() for seed, ids in batches]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


# --- learning --------------------------------------------------------------------------------------------------------


def model() -> Wav2VecPretraining:
    torch.manual_seed(0)
    sizes = Wav2VecSizes(
        transformer=TransformerSizes(d=32, depth=2, heads=2, norm_place="post", eps=1e-5),
        widths=(16, 16), kernels=(10, 8), strides=(5, 8), position_kernel=8, position_groups=2,
    )  # fmt: skip
    task = SpeechTaskSizes(groups=2, codes=8, d_code=16, d_shared=16)
    return Wav2VecPretraining(Wav2Vec(sizes), task)


def tunes(seed: int) -> Batch:
    """Sounds of two lengths; a note is held for 12 time steps, so what is masked can be told from around it."""
    generator = seeded(seed)
    notes = torch.tensor([200.0, 420.0, 900.0, 1900.0])
    parts = []
    for number in range(6):
        picks = notes[torch.randint(4, (3 + number % 2,), generator=generator)].repeat_interleave(480)
        wave = torch.sin(2 * math.pi * torch.cumsum(picks, 0) / 16_000)
        parts.append(wave + 0.02 * torch.randn(wave.shape, generator=generator))
    media = Patches(values=torch.cat(parts)[:, None], grid=torch.tensor([[1, 1, len(part)] for part in parts]))
    ids = torch.zeros(6, 1, dtype=torch.long)
    return Batch(token_ids=ids, labels=ids, segment_ids=ids, media={"audio": media}, item_row={},
                 sample_ids=tuple(f"{seed}-{i}" for i in range(6)))  # fmt: skip


@pytest.mark.row("S4-41")
def test_masked_notes_are_told_from_others():
    learner = model().train()
    objective = MaskedSpeech(learner.tower.grid_out, span=4, starts=0.1, others=10)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)

    def losses(seed: int) -> dict[str, Tensor]:
        given = tunes(seed)
        return {name: x / objective.count(given)[name] for name, x in objective(learner, given).items()}

    first = losses(1000)
    for step in range(80):
        terms = losses(step)
        optimizer.zero_grad()
        (terms["contrast"] + 0.1 * terms["diversity"]).backward()
        optimizer.step()
    with torch.no_grad():
        last = losses(1000)
    assert last["contrast"] < 0.7 * first["contrast"]  # measured: 2.68 to 0.85
    assert last["diversity"] < 0.8  # one code a group would be 0.875


def test_objective_is_the_same_every_time_and_counts_what_it_masks():
    learner, given = model().train(), tunes(0)
    objective = MaskedSpeech(learner.tower.grid_out, span=4, others=5)
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, media: Patches, *, masked: Tensor, generator: torch.Generator):
            seen.append(masked)
            return learner(media, masked=masked, generator=generator)

    one, two = objective(Spy(), given), objective(Spy(), given)
    assert torch.equal(seen[0], seen[1])
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert int(objective.count(given)["contrast"]) == int(seen[0].sum())
    objective(Spy(), replace(given, sample_ids=tuple("uvwxyz")))
    assert not torch.equal(seen[0], seen[2])
    # Half precision: the quantizer's scores and the losses are in float32 all the same.
    assert objective(learner.bfloat16(), given)["contrast"].dtype == torch.float32
