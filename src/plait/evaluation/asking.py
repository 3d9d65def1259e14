"""Put questions to a multimodal model and to its baselines: itself shown nothing, itself before training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from plait.assembly.fit import SQUARE
from plait.assembly.language import language_of
from plait.assembly.multimodal import Multimodal, build_multimodal
from plait.core.device import seed_everything
from plait.core.errors import DataError, NumericsError
from plait.core.events import Events
from plait.core.files import write_json
from plait.core.tensors import Patches
from plait.core.types import Completion, MediaRef, Request, Sample, Text, Turn
from plait.data.collate import joined
from plait.evaluation.answers import Asked
from plait.inference.engine import Engine
from plait.models.connectors.words import ToWords
from plait.models.crossattend import remove

_WHITE = MediaRef(modality="image", sha256="0" * 64, uri="white")
_COLOR = (255, 255, 255)

Pictures = Callable[[Sequence[MediaRef]], Patches]
"""Pictures to features of a model's tower."""


def ask(
    engine: Engine, samples: Sequence[Sample], *, limit: Mapping[str, int], task: str, events: Events
) -> dict[str, str]:
    """Answers to the questions of samples, greedily; the same prompt is answered once.

    Args:
        engine: Of the system.
        samples: Each ends with the right answer, which is not shown.
        limit: Longest answer in tokens, by the samples' ``meta["task"]``.
        task: What progress is called.
        events: Told progress after each batch.

    Returns:
        Answer by the sample's id.
    """
    asked = {sample.id: (sample.turns[:-1], limit[sample.meta["task"]]) for sample in samples}
    # Rows of like length are padded least; the order depends on the questions alone.
    order = sorted(dict.fromkeys(asked.values()), key=lambda prompt: (prompt[1], _characters(prompt[0])))
    answers: dict[tuple[tuple[Turn, ...], int], Completion] = {}
    begun = time.perf_counter()
    for start in range(0, len(order), engine.rows):
        batch = order[start : start + engine.rows]
        requests = [
            Request(id=f"{task} {start + number}", turns=turns, max_new_tokens=longest)
            for number, (turns, longest) in enumerate(batch)
        ]
        answers |= zip(batch, engine(requests), strict=True)
        rate = len(answers) / (time.perf_counter() - begun)
        events.progress(task, len(answers), len(order), samples_per_s=round(rate, 1))
    cut = sum(answer.finish == "length" for answer in answers.values())
    if cut:
        events.note(f"{task}: {cut:,} of {len(answers):,} reached their longest length and end there", cut=cut)
    return {name: answers[prompt].text.strip() for name, prompt in asked.items()}


def show_answers(
    engine: Engine,
    shown: Mapping[str, Sequence[Sample]],
    *,
    step: int,
    phase: str,
    longest: int,
    folder: Path,
    events: Events,
) -> None:
    """Answer a few questions while a model trains: all go to ``samples/<step>.json``, and one of them is said.

    The file is written as a whole, so that a step that is repeated after a resume repeats it. A model whose scores are
    not numbers answers nothing, which is warned of: what to do about it is the training loop's to decide.

    Args:
        engine: Of the model as it is now.
        shown: Questions by split.
        step: Updates so far.
        phase: What is being trained.
        longest: Most tokens of an answer.
        folder: Of the stage.
        events: Told.
    """
    asked = [(split, sample) for split, samples in shown.items() for sample in samples]
    requests = [Request(id=sample.id, turns=sample.turns[:-1], max_new_tokens=longest) for _, sample in asked]
    try:
        answers = engine(requests) if requests else ()
    except NumericsError as fault:
        asked, answers = [], ()
        events.warning(f"{phase}, step {step}: it answers nothing: {fault.cause}")
    records = [
        {
            "id": sample.id,
            "split": split,
            "task": sample.meta["task"],
            "uri": sample.media()[0].uri,
            "question": question(sample),
            "target": sample.text("assistant"),
            "answer": answer.text.strip(),
        }
        for (split, sample), answer in zip(asked, answers, strict=True)
    ]
    (folder / "samples").mkdir(exist_ok=True)
    write_json(folder / "samples" / f"{step:06d}.json", {"step": step, "phase": phase, "samples": records})
    if records:
        one = records[0]
        said = f"asked {one['question']!r} about a picture of {one['target']!r}, it says {one['answer']!r}"
        if one["task"] == "yesno":
            said = f"asked {one['question']!r}, it says {one['answer']!r} (right: {one['target']!r})"
        events.emit("sample", f"{phase}, step {step}: {said}", step=step, phase=phase, **one)


def _characters(turns: Iterable[Turn]) -> int:
    return sum(len(part.text) for turn in turns for part in turn.parts if not isinstance(part, MediaRef))


def question(sample: Sample) -> str:
    """What is asked, whether written or spoken."""
    return str(sample.meta.get("question") or sample.text("user"))


def blanked(sample: Sample, *, sized: bool = False) -> Sample:
    """The same question about a white picture, and heard as before; :func:`white_pictures` has its features.

    Args:
        sample: A question.
        sized: Whether the white picture is as large as the one it stands for, which matters where pictures keep their
            shape; else all are one.
    """
    turns = (replace(turn, parts=tuple(_white(part, sized=sized) for part in turn.parts)) for turn in sample.turns)
    return replace(sample, turns=tuple(turns))


def _white(part: Text | MediaRef, *, sized: bool) -> Text | MediaRef:
    """A white picture in the place of a picture."""
    if isinstance(part, MediaRef) and part.modality == "image":
        return replace(_WHITE, width=part.width, height=part.height) if sized else _WHITE
    return part


def white_pictures(built: Multimodal, *, dtype: torch.dtype, others: Pictures | None = None) -> Pictures:
    """A white picture, whichever is asked for: prepared and encoded once, as all pictures of the model are.

    Args:
        built: Whose tower and contract; on the CPU.
        dtype: Of the features it is compared with, which a cache keeps in 16 bits.
        others: Features of what is no picture: they stay as they are.
    """
    side = built.image.contract.size

    @cache
    def white(size: tuple[int, int]) -> Patches:
        with torch.inference_mode():
            found = built.image.encoder(built.image.prepare(Image.new("RGB", size, _COLOR)))
        return replace(found, values=found.values.to(dtype))

    def size(ref: MediaRef) -> tuple[int, int]:
        known = built.image.contract.fit != SQUARE and ref.width > 0
        return (ref.width, ref.height) if known else (side, side)  # in a square, all white pictures are the same

    def media(refs: Sequence[MediaRef]) -> Patches:
        if others and refs and refs[0].modality != "image":
            return others(refs)
        return joined([white(size(ref)) for ref in refs])

    return media


def untuned(built: Multimodal, *, seed: int) -> Multimodal:
    """The parts of a model as they are before any training, given the model without its adapter.

    The connector is of the same shape, over the same list of words, which does not train, and drawn from the seed.

    Args:
        built: Loaded with ``adapter=False``; not to be used again.
        seed: Of the connector's weights; torch's generator is seeded.
    """
    seed_everything(seed)
    language = built.language
    remove(language.model)
    if built.whole:  # its weights are no longer those it began with
        dtype = str(language.model.dtype).removeprefix("torch.")
        language = replace(language_of(built.decoder, dtype=dtype), tokenizer=language.tokenizer)
    onto = next((module for module in built.model.connectors.modules() if isinstance(module, ToWords)), None)
    fresh = build_multimodal(
        built.towers,
        language,
        built.connectors,
        decoder=built.decoder,
        words=None if onto is None else (onto.words, onto.shape),
    )
    fresh.model.eval()
    fresh.model.requires_grad_(requires_grad=False)
    return fresh


def collect(samples: Sequence[Sample], said: Mapping[str, Mapping[str, str]]) -> list[Asked]:
    """Questions with their answers, to be scored.

    Args:
        samples: Each with the answer that its task names.
        said: By system, answers by the sample's id; a system that was not asked about a sample has none.

    Raises:
        DataError: A sample has no right answer.
    """
    return [
        Asked(
            id=sample.id,
            split=sample.meta["split"],
            task=sample.meta["task"],
            uri=sample.media()[0].uri,
            question=question(sample),
            target=target(sample),
            group=" ".join(sorted(sample.meta["concepts"])),
            answers={system: answers[sample.id] for system, answers in said.items() if sample.id in answers},
        )
        for sample in samples
    ]


def target(sample: Sample) -> str:
    """The right answer.

    Raises:
        DataError: There is none.
    """
    answer = sample.answer(sample.meta["task"])
    if answer is None:
        raise DataError(
            f"no answer is called {sample.meta['task']!r}",
            place=f"sample {sample.id}",
            remedy="make the questions again with the data stage",
        )
    return answer
