"""DPO on packed batches: which token belongs to which answer, which answers make a pair, and what is summed."""

import math

import pytest
import torch
from torch import Tensor, nn

from plait.core.errors import DataError
from plait.core.protocols import Objective
from plait.core.tensors import IGNORE, Batch, Output
from plait.objectives.preference import DirectPreference, answer_logprobs, pair_places

WORDS = 7


class Bigram(nn.Module):
    """Scores from the last token alone; logits where the next token is trained, like ``MultimodalLM``."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(WORDS, WORDS, generator=generator, dtype=torch.float64))

    def forward(self, batch: Batch) -> Output:
        hidden = self.table[batch.token_ids]
        return Output(hidden=hidden, score=lambda: hidden[batch.predicting])


ANSWERS = {
    "a#chosen": ([1, 2, 3, 4], 2),
    "b#rejected": ([2, 2, 5], 1),
    "a#rejected": ([1, 2, 6], 2),
    "b#chosen": ([2, 2, 0, 1], 1),
}
"""Ids, and from where on they are trained."""


def packed(rows: list[list[str]], width: int = 9) -> Batch:
    token_ids, labels, segments = (torch.full((len(rows), width), fill) for fill in (0, IGNORE, 0))
    for number, names in enumerate(rows):
        at = 0
        for segment, name in enumerate(names, 1):
            ids, start = ANSWERS[name]
            token_ids[number, at : at + len(ids)] = torch.tensor(ids)
            labels[number, at + start : at + len(ids)] = torch.tensor(ids[start:])
            segments[number, at : at + len(ids)] = segment
            at += len(ids)
    return Batch(
        token_ids=token_ids,
        labels=labels,
        segment_ids=segments,
        media={},
        item_row={},
        sample_ids=tuple(name for names in rows for name in names),
    )


def by_hand(model: Bigram) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, (ids, start) in ANSWERS.items():
        scores: Tensor = model.table.detach().log_softmax(1)
        found[name] = sum(float(scores[ids[i - 1], ids[i]]) for i in range(start, len(ids)))
    return found


LAYOUTS = [
    [["a#chosen", "b#rejected"], ["a#rejected", "b#chosen"]],
    [["b#chosen"], ["a#rejected"], [], ["b#rejected", "a#chosen"]],
]


@pytest.mark.parametrize("rows", LAYOUTS)
def test_each_token_counts_for_its_own_answer_wherever_it_is_packed(rows: list[list[str]]) -> None:
    model, batch = Bigram(), packed(rows)
    found = dict(zip(batch.sample_ids, answer_logprobs(model, batch).tolist(), strict=True))
    assert found == pytest.approx(by_hand(model), rel=1e-12)


@pytest.mark.row("S2-34")
@pytest.mark.parametrize("rows", LAYOUTS)
def test_the_reference_itself_has_no_margin_and_a_lower_one_of_the_wrong_answer_gives_it(rows: list[list[str]]) -> None:
    model, batch = Bigram(), packed(rows)
    reference = dict(zip(batch.sample_ids, answer_logprobs(model, batch).tolist(), strict=True))
    objective = DirectPreference(reference, beta=0.5)
    assert isinstance(objective, Objective)
    assert {name: int(n) for name, n in objective.count(batch).items()} == dict.fromkeys(
        ("dpo", "margin", "accuracy", "chosen"), 2
    )
    sums = {name: float(value.detach()) for name, value in objective(model, batch).items()}
    assert sums == {"dpo": pytest.approx(2 * math.log(2), rel=1e-15), "margin": 0.0, "accuracy": 0.0, "chosen": 0.0}
    # Where the reference found a's wrong answer likelier by 3 nats, the model has gained a margin of 1.5 on it.
    reference["a#rejected"] += 3.0
    reference["b#chosen"] -= 1.0
    sums = {name: float(value.detach()) for name, value in objective(model, batch).items()}
    expected = sum(math.log1p(math.exp(-m)) for m in (1.5, 0.5))
    assert sums == {"dpo": pytest.approx(expected), "margin": 2.0, "accuracy": 2.0, "chosen": 0.5}


def test_a_step_down_the_gradient_raises_the_right_answer_over_the_wrong_one() -> None:
    model, batch = Bigram(), packed(LAYOUTS[0])
    before = by_hand(model)
    loss = DirectPreference(before, beta=0.1)(model, batch)["dpo"]
    loss.backward()
    assert model.table.grad is not None
    model.table.data -= 0.1 * model.table.grad
    after = by_hand(model)
    for pair in "ab":
        gaps = [known[f"{pair}#chosen"] - known[f"{pair}#rejected"] for known in (before, after)]
        assert gaps[1] > gaps[0]


def test_only_the_loss_has_a_gradient() -> None:
    model, batch = Bigram(), packed(LAYOUTS[0])
    sums = DirectPreference(by_hand(model), beta=0.1)(model, batch)
    assert [name for name, value in sums.items() if value.requires_grad] == ["dpo"]


def test_half_a_pair_is_refused() -> None:
    for ids in (("a#chosen",), ("a#rejected",), ("a#chosen", "b#rejected"), ("a#chosen", "a#rejected", "c"), ("a",)):
        with pytest.raises(DataError, match="other half"):
            pair_places(ids)
    assert pair_places(("b#rejected", "a#chosen", "b#chosen", "a#rejected")) == ([1, 2], [3, 0])


def test_an_answer_without_reference_is_refused() -> None:
    model, batch = Bigram(), packed(LAYOUTS[0])
    reference = by_hand(model)
    del reference["b#chosen"]
    with pytest.raises(DataError, match="1 of 4 answers have no reference") as caught:
        DirectPreference(reference, beta=0.1)(model, batch)
    assert caught.value.place == "sample b#chosen"
