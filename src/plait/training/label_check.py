"""Whether the labels of batches cover the answers, all of them and nothing else; told from the samples' own texts.

The collator decides by ids which positions are trained. Here the other way is taken: trained ids are decoded, and must
read as the answer that the sample has, with the end-of-turn token; what stands before must read as the chat template
writes the turns before. So a fault in the collator or the template's rendering is not repeated in the check.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from plait.core.tensors import IGNORE, Batch
from plait.report.loss_mask import byte_level_text, cells
from plait.training.finding import Finding, named

_SHOWN = 3
_LONGEST = 400  # characters of a sample that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What a sample says, told by the sample itself.

    Attributes:
        messages: Role and text of each turn; media say nothing.
        trained: Which of the turns are learned.
        kind: What kind of sample it is, for counting.
    """

    messages: Sequence[tuple[str, str]]
    trained: Sequence[bool]
    kind: str

    def answers(self) -> list[tuple[int, str]]:
        """Number and text of each turn that is learned."""
        turns = enumerate(zip(self.messages, self.trained, strict=True))
        return [(at, text) for at, ((_, text), trained) in turns if trained]


@dataclass(slots=True)
class _Tally:
    """What was found so far."""

    seen: dict[str, str] = field(default_factory=dict)
    """Sample → its kind."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Kind → trained tokens."""
    positions: int = 0
    trained: int = 0
    faults: dict[str, list[str]] = field(default_factory=dict)
    """What is wrong → samples."""
    first: dict[str, str] = field(default_factory=dict)
    """What is wrong → what the first one trains."""

    def fault(self, what: str, sample: str, said: str = "") -> None:
        self.faults.setdefault(what, []).append(sample)
        self.first.setdefault(what, said)


@dataclass(frozen=True, slots=True)
class Labels:
    """What :func:`check_labels` found.

    Attributes:
        findings: One a check.
        shown: A few samples as lines, what is trained in them between ``«`` and ``»``.
    """

    findings: Sequence[Finding]
    shown: Sequence[str]


Fault = Literal["label", "media", "padding", "nothing", "answer", "end", "more", "place", "unknown", "lost"]

_SAID: Mapping[str, tuple[str, str]] = {
    "label": (
        "labels are not the token that stands there",
        "labels hold the token of their own position; the model shifts them by one, the collator must not",
    ),
    "media": ("places of media are trained", "a placeholder is no word: its label must be -100"),
    "padding": ("padding is trained", "labels of padding must be -100"),
    "nothing": ("nothing is trained", "the sample has no trained turn, or was cut before its answer: leave it out"),
    "end": (
        "the end-of-turn token is not trained",
        "the model would never learn to stop: train the tokenizer's eos_token after each answer",
    ),
    "more": (
        "more than the answer is trained",
        "prompt and template must have the label -100: see the role markers of the chat template",
    ),
    "answer": ("what is trained is not the answer", "see whether labels are shifted, or the sample was cut"),
    "place": (
        "the answer does not follow what the chat template writes before it",
        "compare the rendered prompt with tokenizer.apply_chat_template(..., add_generation_prompt=True)",
    ),
    "unknown": ("samples are not in the data", "the batch must name the samples that it is made of"),
    "lost": ("a trained token has nothing before it", "a sample's first token is never predicted: do not train it"),
}


def check_labels(
    batches: Iterable[Batch], truth: Mapping[str, Truth], *, tokenizer: Any, placeholders: Collection[int]
) -> Labels:
    """Compare what is trained in batches with what the samples say.

    Args:
        batches: Rows of token ids, packed or not; segments numbered from 1 in each row.
        truth: By sample id.
        tokenizer: Decodes; with ``eos_token`` and a chat template.
        placeholders: Ids that stand for a token of a picture or sound.
    """
    tally, shown = _Tally(), list[str]()
    reader = _Reader(tokenizer, frozenset(placeholders))
    for batch in batches:
        padded = (batch.segment_ids == 0) & (batch.labels != IGNORE)
        if bool(padded.any()):
            tally.fault("padding", f"a row with {batch.sample_ids[0] if batch.sample_ids else 'nothing'}")
        for name, ids, labels in _samples(batch):
            if name in tally.seen:
                continue
            known = truth.get(name)
            tally.seen[name] = known.kind if known else "unknown"
            trained = [label != IGNORE for label in labels]
            if known is None:
                tally.fault("unknown", name)
                continue
            if known.kind not in {tally.seen[n] for n in list(tally.seen)[:-1]} and len(shown) < _SHOWN:
                shown.append(reader.shown(name, ids, trained, kind=known.kind))
            tally.positions += len(ids)
            tally.trained += sum(trained)
            tally.tokens[known.kind] += sum(trained)
            _judge(tally, name, (ids, labels), known=known, reader=reader)
    return Labels(list(_findings(tally)), shown)


def _samples(batch: Batch) -> Iterator[tuple[str, list[int], list[int]]]:
    """Id, token ids and labels of each sample of a batch."""
    names = iter(batch.sample_ids)
    rows = zip(batch.token_ids.tolist(), batch.labels.tolist(), batch.segment_ids.tolist(), strict=True)
    for ids, labels, segments in rows:
        for segment, places in itertools.groupby(range(len(ids)), key=segments.__getitem__):
            if segment:
                at = list(places)
                yield next(names, "?"), [ids[i] for i in at], [labels[i] for i in at]


def _judge(tally: _Tally, name: str, sample: tuple[list[int], list[int]], *, known: Truth, reader: _Reader) -> None:
    ids, labels = sample
    trained = [label != IGNORE for label in labels]
    if not any(trained):
        tally.fault("nothing", name)
        return
    if any(on and token in reader.placeholders for on, token in zip(trained, ids, strict=True)):
        tally.fault("media", name)
    if any(on and label != token for on, label, token in zip(trained, labels, ids, strict=True)):
        tally.fault("label", name, reader.text([label for label in labels if label != IGNORE]))
        return
    if trained[0]:
        tally.fault("lost", name)
    runs = [list(run) for on, run in itertools.groupby(range(len(ids)), key=trained.__getitem__) if on]
    found = [reader.text([ids[at] for at in run]) for run in runs]
    answers = known.answers()
    wanted = [text + reader.end for _, text in answers]
    if len(found) == len(wanted) and all(map(_same, found, wanted)):
        for run, (turn, _) in zip(runs, answers, strict=True):
            before = reader.before(known.messages[:turn])
            if before is not None and not _same(reader.text(ids[: run[0]]), before):
                tally.fault("place", name, reader.text(ids[: run[0]])[-60:])
                return
        return
    tally.fault(_kind_of(found, [text for _, text in answers], reader.end), name, " … ".join(found))


def _kind_of(found: Sequence[str], answers: Sequence[str], end: str) -> Fault:
    if len(found) == len(answers) and all(map(_same, found, answers)):
        return "end"
    together = "".join(found)
    if all(text + end in together for text in answers):
        return "more"
    return "answer"


def _same(one: str, other: str) -> bool:
    """Equal, but for a blank that a tokenizer of pieces takes from the beginning of what it decodes."""
    return one == other or one.lstrip(" ") == other.lstrip(" ")


class _Reader:
    """Ids to text."""

    def __init__(self, tokenizer: Any, placeholders: frozenset[int]) -> None:
        self.tokenizer, self.placeholders = tokenizer, placeholders
        self.end = str(tokenizer.eos_token)

    def text(self, ids: Sequence[int]) -> str:
        """What ids say; media say nothing."""
        kept = [token for token in ids if token not in self.placeholders]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def before(self, messages: Sequence[tuple[str, str]]) -> str | None:
        """What the chat template writes before the answer to these; None where it takes no part of a conversation."""
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": role, "content": text} for role, text in messages],
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
        except (TemplateError, ValueError, IndexError):
            return None

    def shown(self, name: str, ids: list[int], trained: list[bool], *, kind: str) -> str:
        """A sample in one line, by what draws the loss mask in the report."""

        def decode(token: int) -> str:
            return byte_level_text(str(self.tokenizer.convert_ids_to_tokens(token)))

        (row,) = cells([ids], [trained], [[1] * len(ids)], placeholders=self.placeholders, decode=decode)
        said = ""
        for (image, on), run in itertools.groupby(row, key=lambda cell: (cell.image, cell.trained)):
            its = list(run)
            text = f"[media x {len(its)}]" if image else "".join(cell.text for cell in its)
            text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            said += f"«{text}»" if on else text
        said = said.replace("\n", "⏎")
        said = said if len(said) <= _LONGEST else f"{said[: _LONGEST // 2]} … {said[-_LONGEST // 2 :]}"
        return f"{kind}: {said}"


def _findings(tally: _Tally) -> Iterator[Finding]:
    count = len(tally.seen)
    if not count:
        yield Finding(name="label mask", status="warn", value="no sample in these batches", fix="give more data")
        return
    for what, samples in tally.faults.items():
        said, fix = _SAID[what]
        example = f": for example {tally.first[what]!r} in {samples[0]}" if tally.first[what] else f": {named(samples)}"
        yield Finding(
            name="label mask",
            status="warn" if what == "place" else "fail",
            value=f"{said} in {len(samples)} of {count} samples{example}",
            fix=fix,
            facts={"fault": what, "samples": samples},
        )
    if not tally.faults:
        yield Finding(
            name="label mask",
            status="ok",
            value=f"{count} samples read back: {tally.trained:,} of {tally.positions:,} tokens are trained: the "
            "answers, each with its end of turn, and nothing else",
            facts={"samples": count, "trained": tally.trained, "tokens": tally.positions},
        )
    kinds = Counter(tally.seen.values())
    parts: list[str] = []
    for kind, samples in kinds.most_common():
        share = tally.tokens[kind] / max(tally.trained, 1)
        mean = tally.tokens[kind] / samples
        parts.append(f"{kind} {share:.0%} of tokens ({samples / count:.0%} of samples, {mean:.1f} each)")
    yield Finding(
        name="trained tokens",
        status="ok",
        value="; ".join(parts),
        facts={kind: {"samples": kinds[kind], "tokens": tally.tokens[kind]} for kind in kinds},
    )


def check_pairs(batch: Batch) -> Iterator[Finding]:
    """Which pairs of a contrastive batch count as positives, and which as negatives.

    Rows are of one class where their label is the same. What the class does not tell is looked up in the batch itself:
    rows whose texts, or pictures, are the very same numbers must not be negatives of each other.

    Args:
        batch: One row a pair: ``labels[:, 0]`` its class, ``media`` one item a row.
    """
    classes = batch.labels[:, 0]
    count = len(classes)
    same = (classes[:, None] == classes[None]) & (classes != IGNORE)[:, None]
    same |= torch.eye(count, dtype=torch.bool, device=same.device)
    positives, negatives = int(same.sum()), int((~same).sum())
    lonely = int((~same).sum(1).eq(0).sum())
    value = (
        f"{count} pairs: {positives:,} positives ({positives - count:,} beside the pairs themselves, of one concept), "
        f"{negatives:,} negatives"
    )
    facts = {"pairs": count, "positives": positives, "negatives": negatives}
    if lonely:
        fix = "give larger batches, or texts that differ more"
        yield Finding(name="pairs", status="fail", value=f"{value}; {lonely} without one", fix=fix, facts=facts)
    else:
        yield Finding(name="pairs", status="ok", value=value, facts=facts)
    for modality, patches in batch.media.items():
        sizes = patches.grid.prod(1)
        if len(sizes) != count or len(set(sizes.tolist())) != 1:
            continue
        rows = patches.values.reshape(count, -1)
        _, which = torch.unique(rows, dim=0, return_inverse=True)
        equal = which[:, None] == which[None]
        false = int((equal & ~same).sum())
        if false:
            yield Finding(
                name=f"the same {modality}",
                status="warn",
                value=f"{false // 2} pairs of rows have the very same {modality} and count as negatives",
                fix="give them one concept, or take one of each out of the data: the loss pushes equals apart",
                facts={"false_negatives": false},
            )
        else:
            alike = int(equal.sum() - count) // 2
            value = f"{alike} pairs of rows have the very same {modality}; none of them is a negative"
            value = value if alike else f"no two rows have the very same {modality}"
            yield Finding(name=f"the same {modality}", status="ok", value=value)
