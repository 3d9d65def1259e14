"""What the samples of a rehearsed stage say, against what its batches train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from plait.assembly.splits import PREFIX
from plait.core.protocols import Batches
from plait.core.tensors import IGNORE, Batch
from plait.core.types import Sample, Text
from plait.data.collate import join_rows
from plait.data.conversations import ConversationBatches
from plait.data.preference_batches import PreferenceBatches
from plait.data.shards import ShardReader
from plait.data.word_batches import WordBatches
from plait.objectives.matching import QueryTasks, same_text
from plait.recipes.rehearse import Phase
from plait.training.finding import Finding
from plait.training.gradient_ways import source_of
from plait.training.label_check import Truth, check_labels, check_pairs

SAMPLES = 120
"""Samples whose labels are read back, at most."""


def labels_of(phase: Phase, *, say: Callable[[Sequence[str]], None]) -> Iterator[Finding]:
    """Check the labels of a phase.

    Args:
        phase: About to train.
        say: Given a few samples as text, with what is trained in them marked.
    """
    source = source_of(phase.asked.batches)
    if isinstance(source, ConversationBatches | PreferenceBatches):
        with ShardReader(phase.data / "shards", f"{PREFIX}train") as reader:
            samples = list(reader)
        truth = dict(item for sample in samples for item in _truth(sample, pairs=isinstance(source, PreferenceBatches)))
        decoded = check_labels(
            _some(source),
            truth,
            tokenizer=phase.asked.hooks.tokenizer,
            placeholders=_placeholders(phase.asked.model),
        )
        yield from decoded.findings
        yield _left_out(source, samples)
        say(["what is trained stands between « and »:", *(f"  {line}" for line in decoded.shown)])
    elif isinstance(source, WordBatches):
        yield _words(source)
    elif isinstance(phase.asked.objective, QueryTasks):
        yield _queries(source, phase.asked.objective)
    else:
        yield from check_pairs(join_rows(source.step_batches(0)))


def _truth(sample: Sample, *, pairs: bool) -> Iterator[tuple[str, Truth]]:
    kind = str(sample.meta.get("task", "sample"))
    messages = [
        (turn.role, "".join(part.text for part in turn.parts if isinstance(part, Text))) for turn in sample.turns
    ]
    trained = [turn.trained for turn in sample.turns]
    if not pairs:
        yield sample.id, Truth(messages=messages, trained=trained, kind=kind)
        return
    yield f"{sample.id}#chosen", Truth(messages=messages, trained=trained, kind=f"{kind}, chosen")
    for wrong in [answer.text for answer in sample.answers if answer.kind == "rejected"][:1]:
        turns = [*messages[:-1], (messages[-1][0], wrong)]
        yield f"{sample.id}#rejected", Truth(messages=turns, trained=trained, kind=f"{kind}, rejected")


def _some(source: ConversationBatches | PreferenceBatches) -> Iterator[Batch]:
    """Batches of some samples; of conversations each once, whatever the mixture would take."""
    if isinstance(source, PreferenceBatches):
        yield from islice(source, max(1, SAMPLES // max(1, 2 * len(source.parts[0]))))
        return
    steps = -(-min(SAMPLES, len(source.conversations)) // source.batch_size)
    longer = replace(source, steps=max(source.steps, steps), dropout=None)
    for step in range(steps):
        yield from longer.step_batches(step)


def _left_out(source: ConversationBatches | PreferenceBatches, samples: Sequence[Sample]) -> Finding:
    """Samples of the data that this phase never sees; none is ever cut."""
    if isinstance(source, PreferenceBatches):
        used = sum(len(part) for part in source.parts)
        value = f"{used:,} of {len(samples):,} questions have a right and a wrong answer and are used; none is cut"
        return Finding(name="samples", status="ok", value=value, facts={"used": used, "data": len(samples)})
    there, shares = {c.id: c for c in source.conversations}, dict(source.weights)
    for name, share in (source.late[1] if source.late else {}).items():
        shares[name] = max(share, shares.get(name, 0.0))
    mixed = [c for c in there.values() if shares.get(c.task, 0.0) > 0]
    long = [c for c in there.values() if len(c.rendered) > source.row]
    empty = [c.id for c in there.values() if not any(c.rendered.trained)]
    value = f"{len(mixed):,} of {len(samples):,} in the data are in the mixture, {len(samples) - len(mixed):,} are not "
    longest = max(len(c.rendered) for c in there.values())
    value += f"(tasks without a share); the longest has {longest:,} tokens of a row of {source.row:,}; none is cut"
    facts = {"mixed": len(mixed), "data": len(samples), "row": source.row}
    if long or empty:
        value = f"{len(long)} are longer than a row, {len(empty)} train nothing"
        return Finding(name="samples", status="fail", value=value, fix="set row to 0, or leave them out", facts=facts)
    return Finding(name="samples", status="ok", value=value, facts=facts)


def _words(source: WordBatches) -> Finding:
    (batch,) = source.step_batches(0)
    words, names = batch.labels[:, :-1], batch.labels[:, -1]
    unknown = int((words == IGNORE).sum())
    value = (
        f"{len(batch.labels)} pictures of {len(names.unique())} names: {words.numel() - unknown:,} words are targets"
        f"{f', {unknown} are not in the list and have no loss' if unknown else ''}"
    )
    facts = {"pictures": len(batch.labels), "words": words.numel() - unknown, "unknown": unknown}
    status = "ok" if bool((names != IGNORE).all()) and unknown < words.numel() else "fail"
    fix = "" if status == "ok" else "every picture needs a name whose words the decoder's vocabulary has"
    return Finding(name="targets", status=status, value=value, fix=fix, facts=facts)


def _queries(source: Batches, objective: QueryTasks) -> Finding:
    batch = join_rows(source.step_batches(0))
    classes = [objective.classes.get(name, -1 - at) for at, name in enumerate(batch.sample_ids)]
    same = same_text(batch.token_ids, batch.segment_ids)
    for one, first in enumerate(classes):
        for two, second in enumerate(classes):
            same[one, two] |= first == second
    positives = int(same.sum())
    count = len(same)
    value = (
        f"{count} pairs: {positives - count:,} more positives (one concept, or one text), "
        f"{count * count - positives:,} negatives"
    )
    facts = {"pairs": count, "positives": positives}
    lonely = int(same.all(1).sum())
    fix = "give larger batches, or texts that differ more" if lonely else ""
    return Finding(name="pairs", status="fail" if lonely else "ok", value=value, fix=fix, facts=facts)


def _placeholders(model: Any) -> list[int]:
    return list(getattr(model, "placeholders", {}).values())
