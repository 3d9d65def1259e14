"""What a right mask says; and each wrong one is found, told from the samples' texts and not from the collator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.core.tensors import IGNORE, Batch, Patches
from plait.core.types import MediaRef, Sample, Text, Turn
from plait.data.collate import collate
from plait.data.template import Template
from plait.training.finding import Finding
from plait.training.label_check import Truth, check_labels, check_pairs

PLACEHOLDER = 900
SLOTS = 3
PICTURE = MediaRef(modality="image", uri="a.png", sha256="ab" * 32, width=2, height=2)

TALKS = {
    "short": [("user", "Is it red?", False), ("assistant", "no", True)],
    "long": [("user", "What is it?", False), ("assistant", "a small yellow cab, seen from above", True)],
    "two": [
        ("system", "Be brief.", False),
        ("user", "Hello", False),
        ("assistant", "hi", True),
        ("user", "And the picture?", False),
        ("assistant", "a house 房", True),
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tiny_folders: dict[str, Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folders["decoder"])


def sample(name: str) -> Sample:
    turns = [Turn(role=role, parts=(Text(text=text),), trained=trained) for role, text, trained in TALKS[name]]
    first = next(at for at, turn in enumerate(turns) if turn.role == "user")
    turns[first] = replace(turns[first], parts=(PICTURE, *turns[first].parts))
    return Sample(id=name, turns=tuple(turns), meta={"task": f"kind of {name}"})


def truth() -> dict[str, Truth]:
    return {
        name: Truth(
            messages=[(role, text) for role, text, _ in turns],
            trained=[trained for *_, trained in turns],
            kind=f"kind of {name}",
        )
        for name, turns in TALKS.items()
    }


def batch(tokenizer: Any, *names: str) -> Batch:
    """Packed: two samples stand in one row."""
    template = Template(tokenizer, placeholder=PLACEHOLDER, slots=lambda ref: SLOTS)
    rendered = [(name, template.sample(sample(name))) for name in names or TALKS]
    features = {PICTURE.sha256: Patches(values=torch.zeros(SLOTS, 2), grid=torch.tensor([[1, 1, SLOTS]]))}
    return collate(rendered, features, grid_out=lambda grid: grid, encoded=True, row=300, pad=0)


def checked(tokenizer: Any, *batches: Batch, **changes: Any) -> Any:
    given = {"truth": truth(), "tokenizer": tokenizer, "placeholders": [PLACEHOLDER]} | changes
    return check_labels(batches, **given)


def faults(found: Any) -> dict[str, Finding]:
    return {f.facts["fault"]: f for f in found.findings if f.facts and "fault" in f.facts}


def test_a_right_mask_reads_back(tokenizer: Any) -> None:
    found = checked(tokenizer, batch(tokenizer))
    assert [finding.status for finding in found.findings] == ["ok", "ok"]
    counts = {"short": len("no") + 1, "long": len("a small yellow cab, seen from above") + 1}
    counts |= {"two": len(b"hi") + 1 + len("a house 房".encode()) + 1}  # the tokenizer reads bytes
    assert found.findings[0].facts["trained"] == sum(counts.values())
    assert found.findings[1].facts == {
        f"kind of {name}": {"samples": 1, "tokens": tokens} for name, tokens in counts.items()
    }
    shown = {line.partition(": ")[0]: line for line in found.shown}
    assert shown["kind of short"] == (
        "kind of short: <|im_start|>user⏎[media x 3]Is it red?<|im_end|>⏎<|im_start|>assistant⏎«no<|im_end|>»⏎"
    )
    assert "«a house 房<|im_end|>»" in shown["kind of two"]


def at(labels: torch.Tensor, batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    return replace(batch, labels=change(labels.clone()))


def shifted(tokenizer: Any) -> Batch:
    good = batch(tokenizer)
    return replace(good, labels=good.labels.roll(1, 1))


def mask_shifted(tokenizer: Any) -> Batch:
    """The mask is one too far to the left; each label is that of its own place."""
    good = batch(tokenizer)
    return replace(good, labels=torch.where(good.labels.roll(-1, 1) != IGNORE, good.token_ids, IGNORE))


def prompt_too(tokenizer: Any) -> Batch:
    good = batch(tokenizer)
    text = (good.segment_ids != 0) & (good.token_ids != PLACEHOLDER)
    text[:, 0] = False
    return replace(good, labels=torch.where(text, good.token_ids, IGNORE))


def header_too(tokenizer: Any) -> Batch:
    """The line break after the role is trained, too."""
    good = batch(tokenizer)
    on = good.labels != IGNORE
    first = on & ~on.roll(1, 1)
    return replace(good, labels=torch.where(on | first.roll(-1, 1), good.token_ids, IGNORE))


def no_end(tokenizer: Any) -> Batch:
    good = batch(tokenizer)
    end = good.token_ids == tokenizer.eos_token_id
    return replace(good, labels=good.labels.masked_fill(end, IGNORE))


def media_too(tokenizer: Any) -> Batch:
    good = batch(tokenizer)
    return replace(good, labels=torch.where(good.token_ids == PLACEHOLDER, good.token_ids, good.labels))


def padding_too(tokenizer: Any) -> Batch:
    good = batch(tokenizer)
    return replace(good, labels=torch.where(good.segment_ids == 0, good.token_ids, good.labels))


def one_cut(tokenizer: Any) -> Batch:
    """The second sample lost its answer."""
    good = batch(tokenizer)
    return replace(good, labels=good.labels.masked_fill(good.segment_ids == 2, IGNORE))


def half_answer(tokenizer: Any) -> Batch:
    good = batch(tokenizer)
    on = good.labels != IGNORE
    return replace(good, labels=good.labels.masked_fill(on & ~on.roll(1, 1), IGNORE))


@pytest.mark.parametrize(
    ("planted", "fault", "says"),
    [
        (shifted, "label", "labels are not the token that stands there"),
        (mask_shifted, "answer", "what is trained is not the answer"),
        (prompt_too, "more", "more than the answer is trained"),
        (header_too, "more", "more than the answer is trained"),
        (no_end, "end", "the end-of-turn token is not trained"),
        (media_too, "media", "places of media are trained"),
        (padding_too, "padding", "padding is trained"),
        (one_cut, "nothing", "nothing is trained in 1 of 3 samples"),
        (half_answer, "answer", "what is trained is not the answer"),
    ],
)
def test_a_wrong_mask_is_found(tokenizer: Any, planted: Callable[[Any], Batch], fault: str, says: str) -> None:
    found = faults(checked(tokenizer, planted(tokenizer)))
    assert fault in found
    assert found[fault].status == "fail"
    assert says in found[fault].value
    assert found[fault].fix


def test_an_answer_in_another_place_and_a_foreign_sample_are_told(tokenizer: Any) -> None:
    other = truth()
    other["short"] = replace(other["short"], messages=[("user", "Is it blue?"), ("assistant", "no")])
    found = faults(checked(tokenizer, batch(tokenizer), truth=other))
    assert {name: finding.status for name, finding in found.items()} == {"place": "warn"}
    del other["short"]
    assert "not in the data" in faults(checked(tokenizer, batch(tokenizer), truth=other))["unknown"].value


def test_no_batch_is_a_warning(tokenizer: Any) -> None:
    (finding,) = checked(tokenizer).findings
    assert finding.status == "warn"


def pairs(classes: list[int], texts: list[int]) -> Batch:
    count = len(classes)
    ones = torch.ones(count, 3, dtype=torch.long)
    values = torch.tensor(texts, dtype=torch.float32)[:, None] * torch.ones(1, 4)
    return Batch(
        token_ids=torch.zeros(count, 1, dtype=torch.long),
        labels=torch.tensor(classes)[:, None],
        segment_ids=ones[:, :1],
        media={"text": Patches(values=values, grid=ones)},
        item_row={"text": torch.arange(count)},
        sample_ids=tuple(map(str, range(count))),
    )


def test_positives_and_negatives_are_counted() -> None:
    found = {finding.name: finding for finding in check_pairs(pairs([0, 0, 1, 2, 2, 2], [0, 1, 2, 3, 3, 5]))}
    assert found["pairs"].facts == {"pairs": 6, "positives": 4 + 1 + 9, "negatives": 36 - 14}
    assert found["the same text"].status == "ok"
    assert "1 pairs of rows" in found["the same text"].value


def test_equal_texts_that_are_negatives_and_rows_without_negatives_are_told() -> None:
    found = {finding.name: finding for finding in check_pairs(pairs([0, 1, 2], [7, 7, 8]))}
    assert found["the same text"].status == "warn"
    assert found["the same text"].facts == {"false_negatives": 2}
    assert next(iter(check_pairs(pairs([4, 4], [1, 2])))).status == "fail"
