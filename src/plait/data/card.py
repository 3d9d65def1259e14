"""The data card ``card.md``: what the data is, where it comes from, on what terms, and what it is not, on one page.

No date and no path of this machine beyond the settings: the same data gives the same page.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from plait.core.types import Sample
from plait.data.instructions import TASKS
from plait.data.ledger import Ledger, explain
from plait.data.sources import VALIDATION, Gathered
from plait.data.speech import RATE, version
from plait.data.spoken import STAYS, Spoken

SPLITS: Mapping[str, str] = {
    "train": "what models are trained on",
    VALIDATION: "held out too, in the training style: judged by while training, never a test",
    "test-concept": "held-out concepts in the training style: unseen things",
    "test-style": "trained concepts in another style: unseen drawing",
    "test-both": "held-out concepts in another style: unseen in every way",
}
"""Every split there can be, and what it tests."""


def make_card(
    *,
    settings: Mapping[str, Any],
    gathered: Gathered,
    ledger: Ledger,
    pictures: Mapping[str, Sequence[Sample]],
    questions: Mapping[str, Sequence[Sample]],
    spoken: Mapping[str, Spoken] | None = None,
) -> str:
    """The card as Markdown.

    Args:
        settings: The stage's settings, as plain data.
        gathered: What the source handed over.
        ledger: The fate of every row.
        pictures: Samples by split.
        questions: Instruction samples by split.
        spoken: How many of them are asked aloud, by split.
    """
    totals = ledger.totals()
    everything = [sample for samples in pictures.values() for sample in samples]
    parts = [
        "# Data card\n",
        f"{len(everything):,} labelled pictures and {sum(map(len, questions.values())):,} questions about them, "
        f"made from {totals['rows']:,} source rows: {totals['kept']:,} kept, {totals['changed']:,} changed, "
        f"{totals['dropped']:,} dropped.\n",
        "## Splits\n",
        _table(
            ("split", "pictures", "concepts", "what it is"),
            ((s, len(x), len({p.meta["concept"] for p in x}), SPLITS.get(s, "")) for s, x in pictures.items()),
        ),
        f"{_facts(gathered.facts)}. No concept is both trained and held out: {gathered.together}. "
        "Which concepts are held out depends on the seed and the concepts alone.\n",
        "## Questions\n",
        _table(
            ("task", *questions),
            ((task, *(sum(q.meta["task"] == task for q in asked) for asked in questions.values())) for task in TASKS),
        ),
        "Pictures and names in a question come from its own split; its wording is one of several. Half of the yes/no "
        "answers are yes, and a name is the wrong one as often as it is the right one, so far as the names allow.\n",
        *(_aloud(spoken) if spoken else []),
        "## Fate of every row\n",
        _table(
            ("source", "fate", "rows", "reason", "meaning"),
            ((source, fate, n, reason, explain(fate, reason)) for source, fate, reason, n in ledger.summary()),
        ),
        f"Faulty rows: {totals['faults']:,}. One line for each row is in `ledger.jsonl`.\n",
        "## Sources, licences, attributions\n",
        *(
            f"- **{o.name}** ({o.package}): {o.gives}. Licence: {o.licence}.\n  {o.attribution}\n"
            for o in gathered.origins
        ),
        "## What is in it\n",
        _contents(everything),
        "## Known limits\n",
        *(f"- {limit}\n" for limit in gathered.limits),
        "\n## How to make it again\n",
        "The same settings, packages and libraries give the same bytes. In a recipe:\n\n"
        f"```yaml\ndata: {json.dumps(settings, ensure_ascii=False, default=str)}\n```\n",
    ]
    return "\n".join(part.rstrip("\n") if part.startswith("- ") else part for part in parts)


def _aloud(spoken: Mapping[str, Spoken]) -> list[str]:
    reasons = sorted({reason for counts in spoken.values() for reason in counts.written})
    rows = [
        (split, c.spoken, c.sounds, f"{c.seconds:,.0f}", ", ".join(sorted(c.voices)), *(c.written[r] for r in reasons))
        for split, c in spoken.items()
    ]
    return [
        "## Spoken questions\n",
        _table(("split", "spoken", "sounds", "seconds", "voices", *(f"written: {r}" for r in reasons)), rows),
        f"Spoken by {version()}, which is under GPL-3.0-or-later, as {RATE:,} samples a second; a sample's meta keeps "
        "the text, the voice and the words a minute. They are sounds of a machine, clearer and more alike than those "
        "of people.\n",
        *(f"- written: {reason}: {STAYS[reason]}\n" for reason in reasons),
    ]


def _facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {value:,}" for name, value in facts.items())


def _contents(samples: Sequence[Sample]) -> str:
    lines: list[str] = []
    for name in ("name.en", "name.zh", "group", "keywords.en"):
        texts = [text for sample in samples if (text := sample.answer(name))]
        if texts:
            lengths = [len(text.split()) for text in texts] if name != "name.zh" else [len(text) for text in texts]
            unit = "characters" if name == "name.zh" else "words"
            lines.append(
                f"- `{name}`: {len(texts):,} pictures, {len(set(texts)):,} different, "
                f"{min(lengths)} to {max(lengths)} {unit}, median {statistics.median(lengths):g}"
            )
    groups = Counter(group for sample in samples if (group := sample.answer("group")))
    if groups:
        lines.append(f"- groups: {', '.join(f'{group} {n:,}' for group, n in groups.most_common())}")
    sizes = Counter((ref.width, ref.height) for sample in samples for ref in sample.media())
    shown = ", ".join(f"{w} x {h} ({n:,})" for (w, h), n in sizes.most_common(5))
    lines.append(f"- picture sizes in pixels: {shown}{f' and {len(sizes) - 5:,} others' if len(sizes) > 5 else ''}")
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def line(cells: Iterable[object]) -> str:
        shown = (f"{cell:,}" if isinstance(cell, int) else str(cell).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(shown)} |"

    return "\n".join([line(head), line("---" for _ in head), *map(line, rows)]) + "\n"
