"""What judges training is the loss of all samples together, however they are split; the model stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_run import CPU, VOCABULARY, Counted, rows, tiny_model, train
from tests.unit.training.pairwise_model import dual, pairs
from torch import nn

from plait.core.errors import ConfigError, DataError
from plait.core.files import read_jsonl
from plait.core.tensors import IGNORE, Batch
from plait.data.sources import JUDGED_SEED
from plait.objectives.contrastive import Contrastive
from plait.objectives.matching import QueryTasks
from plait.training.settings import Settings, Stopping, judged
from plait.training.trainer import Trainer, Validate
from plait.training.validate import Judged, Validation, mean_loss

SAMPLES = torch.randint(VOCABULARY, (12, 3), generator=torch.Generator().manual_seed(4))


class Double:
    """Two terms of different counts; in float64."""

    needs_global_batch = False

    def count(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {
            "text": (batch.labels != IGNORE).sum(),
            "rows": torch.tensor(len(batch.sample_ids)),
            "none": 0 * batch.labels.sum(),
        }

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits = model(nn.functional.one_hot(batch.token_ids, VOCABULARY).double())
        nats = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
        return {"text": nats, "rows": logits.square().sum(), "none": nats * 0}


def parts(sizes: Sequence[int]) -> list[Batch]:
    found, start = [], 0
    for size in sizes:
        found.append(rows(SAMPLES[start : start + size], *(f"s{i}" for i in range(start, start + size))))
        start += size
    return found


@pytest.mark.row("S4-63")
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6).map(lambda sizes: [*sizes, 12]))
def test_terms_are_those_of_one_big_batch_whatever_the_split(sizes: list[int]) -> None:
    cut, left = [], 12
    for size in sizes:
        cut.append(min(size, left))
        left -= cut[-1]
    model = tiny_model().double().eval()
    found = mean_loss(model, Double(), parts([size for size in cut if size]), compute=CPU)
    with torch.no_grad():
        logits = model(nn.functional.one_hot(SAMPLES, VOCABULARY).double())
        nats = nn.functional.cross_entropy(logits.flatten(0, 1), SAMPLES.flip(1).flatten())
    assert found == pytest.approx({"text": float(nats), "rows": float(logits.square().sum() / 12)}, rel=1e-12)


@pytest.mark.row("S4-63")
@pytest.mark.parametrize("micro", [0, 1, 3, 5])
def test_pairs_are_told_apart_over_all_pieces(micro: int) -> None:
    model = dual().eval()
    whole = pairs()
    with torch.no_grad():
        (batch,) = whole.step_batches(0)
        objective = Contrastive()
        expected = {n: float(v / objective.count(batch)[n]) for n, v in objective(model, batch).items()}
    found = mean_loss(model, Contrastive(), pairs(micro_batch=micro).step_batches(0), compute=CPU)
    assert found == pytest.approx(expected, rel=1e-12)


def test_what_has_to_be_in_one_piece_and_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="QueryTasks compares all samples with each other, but they come in 2 parts"):
        mean_loss(nn.Identity(), QueryTasks(), parts([2, 2]), compute=CPU)


@pytest.mark.parametrize("batches", [[], [rows(torch.full((1, 2), IGNORE), "blank")]])
def test_nothing_to_judge_by_is_an_error(batches: list[Batch]) -> None:
    class Nothing(Double):
        def count(self, batch: Batch) -> dict[str, torch.Tensor]:
            return {"text": torch.tensor(0)}

        def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            return {"text": torch.tensor(0.0)}

    with pytest.raises(DataError, match="nothing to evaluate"):
        mean_loss(nn.Identity(), Nothing(), batches, compute=CPU)


@pytest.mark.row("S4-63")
def test_weights_are_those_of_training_and_nothing_is_dropped() -> None:
    model = tiny_model().double()
    assert model.training
    held, seen = (Judged(objective=Double(), batches=lambda of=of: parts([5, 7])[of:]) for of in (0, 1))
    validation = Validation(model=model, held=held, trained=seen, weights={"rows": 0.25}, compute=CPU)
    found = validation()
    assert not model.training
    assert found == validation()
    assert found["evaluation"] == found["evaluation/text"] + 0.25 * found["evaluation/rows"]
    model.eval()
    assert found["evaluation_training"] == pytest.approx(
        sum(
            weight * value
            for weight, value in zip(
                (1, 0.25), mean_loss(model, Double(), parts([5, 7])[1:], compute=CPU).values(), strict=True
            )
        )
    )
    only = Validation(model=model, held=held, weights={"rows": 0.0}, compute=CPU)()
    assert only["evaluation"] == only["evaluation/text"]
    assert "evaluation/rows" in only
    assert "evaluation_training" not in only


def test_training_goes_on_as_if_nobody_had_looked(tmp_path: Any) -> None:
    """Dropout draws what it drew, in the mode it had; the values are in the records."""
    finals = []
    for name in ("judged", "not"):
        model = tiny_model()
        held = Judged(objective=Counted(), batches=lambda: [rows(SAMPLES, *map(str, range(12)))])
        validation = Validation(model=model, held=held, trained=held, weights={}, compute=CPU)
        stopping = {"stopping": Stopping(every=2, higher=False)} if name == "judged" else {}
        evaluate = {"evaluate": validation} if name == "judged" else {}
        # The last step is the best one only by chance: what is compared is what the checkpoint of it holds.
        train(tmp_path / name, model=model, **stopping, **evaluate)
        finals.append(read_jsonl(tmp_path / name / "metrics.jsonl"))
    assert [r["loss"] for r in finals[0]] == [r["loss"] for r in finals[1]]
    assert [r["step"] for r in finals[0] if "evaluation" in r] == [2, 4, 6]
    assert all(r["evaluation"] == r["evaluation/text"] == r["evaluation_training"] for r in finals[0][1::2])


def test_a_plain_value_is_one_too() -> None:
    assert judged(lambda: 2) == {"evaluation": 2}
    assert judged(lambda: {"evaluation": 1, "more": torch.tensor(3.0)}) == {"evaluation": 1.0, "more": 3.0}
    with pytest.raises(ConfigError, match="the hook evaluate gives loss"):
        judged(lambda: {"loss": 1.0})


def test_a_recipe_says_when_and_how_long() -> None:
    trainer = Trainer(validation=Validate(every=7, samples=9, patience=2, least_gain=0.1))
    found = Settings(steps=1, compute=CPU).with_trainer(trainer, lr=0.1)
    assert found.stopping == Stopping(every=7, patience=2, least_gain=0.1)
    assert found.plain()["context"]["validation"] == {"samples": 9, "seed": JUDGED_SEED}
    assert Settings(steps=1, compute=CPU).with_trainer(Trainer(), lr=0.1).stopping is None
