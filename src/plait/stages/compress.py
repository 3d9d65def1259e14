"""The compress stage: the decoder's linear layers in 8 bits, with size and accuracy before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from plait.core.estimate import Estimate, Machine, made_before, picture_slots
from plait.core.events import Events
from plait.core.packages import home
from plait.stages.stage import Stage, Task

if TYPE_CHECKING:
    from plait.assembly.multimodal import Multimodal
    from plait.assembly.questions import Questions
    from plait.compression.quantize import Quantized
    from plait.core.types import Sample, Score
    from plait.evaluation.answers import Asked

BEFORE = "uncompressed"
"""What the compressed model is compared with: itself before, adapter and all."""

MODEL = "model"
"""The multimodal folder that the stage leaves."""

# For the estimate: the longer of both kinds of emoji question in SmolLM2's tokens, with template and picture.
_PROMPT_TOKENS, _PICTURE_TOKENS = 26, 6
_CONNECTOR_WEIGHTS = 9_700_000  # of tune's default connector, with its list of words
_SECONDS_START = (3.0, 20.0)  # reading the decoder twice, merging and rounding it, writing it


class Compress(Stage):
    """Round the linear layers of the newest model's decoder to 8 bits, one scale an output channel, after training.

    The adapter is merged in float32 first; activations, embeddings, the head that shares them, and norms stay as they
    are. The folder ``model/`` loads without the decoder's own package. Then it is read back, and the model before and
    the one after answer the same held-out questions. Writes ``model/``, ``compress.json`` (bytes by part),
    ``scores.json`` and ``predictions.jsonl``.

    Example:
        >>> Compress(questions=32).format
        'int8'
    """

    # The checker cannot know that specs are frozen, so that narrowing a field is safe.
    kind: Literal["compress"] = "compress"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which stage this is."""
    format: Literal["int8"] = "int8"
    """Number format of the weights."""
    tasks: tuple[Task, ...] = Field(default=("name.en", "yesno"), min_length=1)
    """What both models are asked."""
    test_split: Literal["test-concept", "test-style", "test-both"] = "test-style"
    """Split that is asked about; where it is missing, another held-out one is, or at last the training split."""
    questions: int = Field(default=64, ge=1)
    """Most questions of a task."""
    max_new_tokens: int = Field(default=12, ge=1)
    """Longest answer."""
    rows: int = Field(default=32, ge=1)
    """Questions answered together."""

    def run(self, previous: Path | None, folder: Path, *, events: Events) -> Path:
        """Do the work; see :meth:`plait.stages.stage.Stage.run`.

        Raises:
            DataError: There is no data stage or no model before this one, or no question is there to ask.
            CheckpointError: The model is damaged, or compressed already.
            NumericsError: A weight is not finite.
            ResourceError: A package is not fetched, or the disk is full.
        """
        from plait.assembly.multimodal import load_multimodal, save_multimodal
        from plait.compression.quantize import part_bytes, quantize_decoder
        from plait.core.device import setup
        from plait.core.files import find_model, find_stage, folder_atomic, mark_done, write_json, write_jsonl
        from plait.core.manifest import write_manifest
        from plait.evaluation.asking import collect

        source, data = find_model(previous), find_stage(previous, "data")
        setup(device="cpu")
        built = load_multimodal(source, events=events)
        before = part_bytes(built)
        questions, split = self._questions(built, data / "shards", events)
        said = {BEFORE: self._answers(built, questions, split, task="answers before", events=events)}
        made = quantize_decoder(built)
        with folder_atomic(folder / MODEL) as target:
            save_multimodal(made.built, target)
            write_manifest(target, step=0)
        after = part_bytes(made.built)
        # What is scored is what was written.
        built = load_multimodal(folder / MODEL, events=events)
        said["model"] = self._answers(built, questions, split, task="answers after", events=events)
        asked = collect(questions.samples[split], said)
        scores = _scores(asked)
        record = _record(before, after, made, model=folder / MODEL)
        write_json(folder / "compress.json", record)
        write_json(folder / "scores.json", [asdict(score) for score in scores])
        write_jsonl(folder / "predictions.jsonl", [row.record() for row in asked])
        summary = {
            "lines": _lines(record, scores, made, split=split),
            "model": MODEL,
            "bytes": {"before": record["before"]["bytes"], "after": record["after"]["bytes"]},
            "layers": made.layers,
            "split": split,
            "questions": len(asked),
        }
        for line in summary["lines"]:
            events.note(line)
        mark_done(folder, kind=self.kind, previous=previous, summary=summary)
        return folder

    def estimate(self, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
        """What the stage will need; see :meth:`plait.stages.stage.Stage.estimate`."""
        from plait.training import cost, peak

        made = made_before(before)
        shape, dtype = cost.planned_decoder(before, machine)
        connectors = made.connectors + made.words if made else _CONNECTOR_WEIGHTS
        answers = 2 * self.questions * len(self.tasks)
        slots = picture_slots(before, _PICTURE_TOKENS)
        prompt = _PROMPT_TOKENS - _PICTURE_TOKENS + slots
        flops = cost.generate_flops(shape, rows=answers, prompt=prompt, new=self.max_new_tokens)
        # A step that makes one token a row reads all weights for little work.
        slow, fast = cost.EFFICIENCY[dtype]
        low, high = cost.time_range(flops, machine, dtype=dtype, efficiency=(slow / 2, fast))
        length = prompt + self.max_new_tokens
        kept = cost.decoder_activations(
            shape, rows=self.rows, length=length, dtype=dtype, gradients="none", attention="eager"
        )
        rest = shape.params - shape.linear_params
        written = shape.linear_params + cost.BYTES[dtype] * rest + 4 * connectors
        memory = peak.peak_memory(
            machine,
            # Merging is done in float32; the weights before go one by one as those after come.
            frozen=shape.params,
            frozen_dtype="float32",
            activations=kept + cost.logits_bytes(shape, self.rows, gradients="none"),
            caches=cost.kv_cache_bytes(shape, rows=self.rows, length=length, dtype=dtype) + shape.linear_params,
        )
        return Estimate(
            stage=self.kind,
            params_frozen=shape.params,
            tokens=answers * length,
            image_tokens=answers * slots,
            flops=flops,
            memory=memory,
            disk_bytes=written + answers * 200,
            seconds=(low + _SECONDS_START[0], high + _SECONDS_START[1]),
            notes=(
                f"{answers:,} answers, half of them by the compressed model",
                f"sizes are those of {'the decoder before' if made else 'smollm2'}",
            ),
        )

    # --- inside ----------------------------------------------------------------------------------------------------

    def _questions(self, built: Multimodal, shards: Path, events: Events) -> tuple[Questions, str]:
        from plait.assembly.questions import read_questions
        from plait.assembly.splits import PREFIX, splits_of
        from plait.data.choice import held_out, spread

        split = held_out(splits_of(shards, prefix=PREFIX), self.test_split) or "train"
        if split != self.test_split:
            events.note(f"there are no questions of {self.test_split}: those of {split} are asked")

        def choose(_: str, samples: Sequence[Sample]) -> Sequence[Sample]:
            return [
                sample
                for task in self.tasks
                for sample in spread(samples, (task,), limit=self.questions, seed=self.seed)
            ]

        questions = read_questions(
            shards, (split,), built.image, choose=choose, cache=home() / "features", events=events, audio=built.audio
        )
        return questions, split

    def _answers(
        self, built: Multimodal, questions: Questions, split: str, *, task: str, events: Events
    ) -> dict[str, str]:
        from plait.evaluation.asking import ask
        from plait.inference.build import build_engine

        engine = build_engine(built, questions.features, rows=self.rows)
        limit = dict.fromkeys(map(str, self.tasks), self.max_new_tokens)
        return ask(engine, questions.samples[split], limit=limit, task=task, events=events)


def _scores(asked: Sequence[Asked]) -> list[Score]:
    """Both models' scores, and how often they give the very same answer."""
    from plait.evaluation.answers import score_answers
    from plait.evaluation.statistics import mean_score

    scores = score_answers(asked, rules={BEFORE: "before compression"})
    for task in dict.fromkeys(row.task for row in asked):
        rows = [row for row in asked if row.task == task]
        same = [float(row.answers["model"] == row.answers[BEFORE]) for row in rows]
        name, groups = f"{rows[0].split}/{task}/agreement", [row.group for row in rows]
        scores.append(mean_score(same, name=name, rule="match/same-text-as-uncompressed", groups=groups))
    return scores


def _record(before: Mapping[str, int], after: Mapping[str, int], made: Quantized, *, model: Path) -> dict[str, Any]:
    from plait.assembly.compressed import DECODER

    return {
        "format": "int8, symmetric, one float32 scale an output channel, round to nearest",
        "before": {"bytes": sum(before.values()), "parts": dict(before)},
        "after": {"bytes": sum(after.values()), "parts": dict(after)},
        "files": {path.name: path.stat().st_size for path in (model / DECODER, model / "model.safetensors")},
        "tensors": made.layers,
        "merged_adapters": made.merged,
        "relative_error": made.error,
        "largest_error_in_scales": made.largest_error,
    }


def _lines(record: Mapping[str, Any], scores: Sequence[Score], made: Quantized, *, split: str) -> list[str]:
    from plait.evaluation.answers import leading

    before, after = (record[when]["bytes"] for when in ("before", "after"))
    lines = [
        f"decoder, adapter and connector: {before / 2**20:,.1f} MiB before, {after / 2**20:,.1f} MiB after "
        f"({before / after:.2f} times smaller); {made.layers} layers in 8 bits, error {made.error:.2%} of the weights"
    ]
    named = {score.name: score for score in scores}
    for task in dict.fromkeys(score.name.split("/")[1] for score in scores):
        part, metric = f"{split}/{task}", leading(task)
        now, then = named[f"{part}/{metric}"], named[f"{part}/{metric}/{BEFORE}"]
        gain, same = named[f"{part}/{metric}/gain-over-{BEFORE}"], named[f"{part}/agreement"]
        lines.append(
            f"{split}, {task}: {metric} {now.value:.3f} after, {then.value:.3f} before (difference {gain.low:+.3f} to "
            f"{gain.high:+.3f}, {now.n:,} questions); the same answer to {same.value:.1%}"
        )
    return lines
