"""The evaluate stage: a tuned model on held-out questions, beside chance, a blank picture and itself untuned."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from plait.core.errors import DataError, PlaitError
from plait.core.estimate import Estimate, Machine, picture_slots
from plait.core.events import Events
from plait.core.packages import home
from plait.stages.stage import Stage, Task

if TYPE_CHECKING:
    from plait.assembly.multimodal import Multimodal
    from plait.assembly.questions import Questions
    from plait.core.types import Sample

Baseline = Literal["blank", "untuned"]

TESTS = ("test-concept", "test-style", "test-both")
"""Splits that are asked about, as far as the data stage made them."""

_YES_NO_TOKENS = 4  # only the first word of such an answer counts

# For the estimate: counted with SmolLM2's tokenizer on the emoji questions; pictures as tune makes them by default.
_QUESTION_TOKENS = {
    "name.en": 5,
    "name.zh": 11,
    "yesno": 13,
    "group": 24,
    "left": 7,
    "right": 7,
    "above": 7,
    "count": 7,
}
_TEMPLATE_TOKENS, _PICTURE_TOKENS = 8, 6
_PER_PICTURE = {"name.en": 1, "name.zh": 1, "yesno": 2, "group": 1}
_CANVAS_QUESTIONS = {"left": 16, "right": 16, "above": 16, "count": 24}  # a test split, of 40 canvases
_TOWER_WEIGHTS, _CELLS, _FEATURE_WIDTH = 4_652_008, 16, 1280
_SECONDS_PER_PICTURE = (0.010, 0.050)
_SECONDS_LOAD = (2.0, 12.0)  # imports once, and reading a decoder for each model


class Evaluate(Stage):
    """Ask the newest model the questions of the test splits, greedily, and score its answers.

    Beside it: ``chance``, the constant answer that would be best on the training answers (a coin for yes/no);
    ``blank``, the same model shown a white picture, so that only the text can help it; ``untuned``, the composition
    before any training: the decoder without adapter, behind a connector of the same shape drawn from the seed. Writes
    ``scores.json`` (95 % intervals that resample whole concepts; paired differences) and ``predictions.jsonl``. An
    interrupted stage starts over and comes out the same.

    Example:
        >>> Evaluate(max_names=50).baselines
        ('blank', 'untuned')
    """

    # The checker cannot know that specs are frozen, so that narrowing a field is safe.
    kind: Literal["evaluate"] = "evaluate"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which stage this is."""
    tasks: tuple[Task, ...] = Field(
        default=("name.en", "yesno", "group", "left", "right", "above", "count", "name.zh"), min_length=1
    )
    """What is asked; Chinese names are scored apart, in characters."""
    baselines: tuple[Baseline, ...] = ("blank", "untuned")
    """What the model has to beat, besides chance: itself with a blank picture, itself before training."""
    baseline_tasks: tuple[Task, ...] = ("name.en", "yesno")
    """What baselines are asked, of the tasks."""
    max_names: int = Field(default=200, ge=1)
    """Most English names asked for in a split."""
    max_yes_no: int = Field(default=400, ge=2)
    """Most yes/no questions in a split, half of them to be answered yes."""
    max_items: int = Field(default=200, ge=1)
    """Most questions of each other task in a split."""
    max_new_tokens: int = Field(default=12, ge=1)
    """Longest answer; of a yes/no answer only four tokens are made, as its first word decides."""
    rows: int = Field(default=32, ge=1)
    """Questions answered together."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs: `auto`, `cpu`, `cuda` or `mps`."""

    def run(self, previous: Path | None, folder: Path, *, events: Events) -> Path:
        """Do the work; see :meth:`plait.stages.stage.Stage.run`.

        Raises:
            DataError: There is no data stage or no tuned model before this one, no question is there to ask, or a shard
                is damaged.
            CheckpointError: The model cannot be read.
            ResourceError: A package is not fetched, or the disk is full.
        """
        from plait.core.device import setup
        from plait.core.files import find_model, find_stage, mark_done, write_json, write_jsonl
        from plait.evaluation.answers import CHANCE, best_constants, gates, is_main, score_answers, tell
        from plait.evaluation.asking import collect

        model, data = find_model(previous), find_stage(previous, "data")
        # What tune left tells decoder and adapter apart; a later stage may have merged them.
        tuned = find_model(find_stage(previous, "tune")) if "untuned" in self.baselines else model
        device = setup(device=self.device).device
        training = _training_answers(data / "shards")
        samples, said = self._ask(model, data, device=device, events=events)
        if "untuned" in self.baselines:
            said["untuned"] = self._ask_untuned(tuned, data, samples, device=device, events=events)
        constants = best_constants({task: training[task] for task in self.tasks if task in training})
        said[CHANCE] = {s.id: constants[s.meta["task"]] for s in samples if s.meta["task"] in constants}
        asked = collect(samples, said)
        rules = {
            "blank": "blank=white-picture",
            "untuned": f"untuned=no-adapter,connector-drawn-from-seed-{self.seed}",
            CHANCE: "chance=constant-best-on-training-answers",
        }
        scores = score_answers(asked, rules=rules)
        passed = gates(scores)
        write_json(folder / "scores.json", [asdict(score) for score in scores])
        write_jsonl(folder / "predictions.jsonl", [row.record() for row in asked])
        summary = {
            "lines": tell(scores, passed, retrieval=_retrieval(previous)),
            "scores": {s.name: [round(v, 4) for v in (s.value, s.low, s.high)] for s in scores if is_main(s)},
            "gates": {gate.name: gate.passed for gate in passed},
            "questions": dict(Counter(f"{row.split}/{row.task}" for row in asked)),
            "constants": constants,
        }
        for line in summary["lines"]:
            events.note(line)
        mark_done(folder, kind=self.kind, previous=previous, summary=summary)
        return folder

    def check(self, machine: Machine) -> None:
        """See that the device is here; see :meth:`plait.stages.stage.Stage.check`."""
        if self.device not in ("auto", "cpu", machine.device):
            from plait.core.device import choose_device  # imports torch

            try:
                choose_device(self.device)
            except PlaitError as error:
                error.place = f"stages.{self.kind}.device"
                raise

    def estimate(self, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
        """What the stage will need; see :meth:`plait.stages.stage.Stage.estimate`."""
        from plait.training import cost, peak

        decoder, dtype = cost.planned_decoder(before, machine)
        known = before["data"].samples if "data" in before else {}
        samples = {split: known[split] for split in TESTS if split in known}
        if known and not any(samples.values()):
            raise DataError(
                "nothing is held out: there will be nothing to score",
                place=f"stages.{self.kind}",
                remedy=f"set data.source.test_fraction above 0, or do without the stage: stages.{self.kind}=null",
            )
        slots = picture_slots(before, _PICTURE_TOKENS)
        canvases = sum(self._expected("count", number) for number in samples.values()) // 2
        pictures, answers = sum(samples.values()) + canvases, 0
        flops, tokens, longest = 0.0, 0, 0
        for task in dict.fromkeys(self.tasks):
            # A blank picture's name is asked for once a wording.
            beside = [b for b in self.baselines if task in self.baseline_tasks and (b, task) != ("blank", "name.en")]
            systems = 1 + len(beside)
            questions = systems * sum(self._expected(task, number) for number in samples.values())
            prompt = slots + _TEMPLATE_TOKENS + _QUESTION_TOKENS[task]
            new = self._limit()[task]
            flops += cost.generate_flops(decoder, rows=questions, prompt=prompt, new=new)
            tokens += questions * (prompt + new)
            answers, longest = answers + questions, max(longest, prompt + new)
        # A step that makes one token a row reads all weights for little work.
        slow, fast = cost.EFFICIENCY[dtype]
        low, high = cost.time_range(flops, machine, dtype=dtype, efficiency=(slow / 2, fast))
        models = 1 + ("untuned" in self.baselines)
        seconds = [_SECONDS_LOAD[i] * models + canvases * _SECONDS_PER_PICTURE[i] for i in (0, 1)]
        shape: dict[str, Any] = {"rows": self.rows, "length": longest, "dtype": dtype}
        features = pictures * _CELLS * _FEATURE_WIDTH * 2
        return Estimate(
            stage=self.kind,
            samples=samples,
            params_frozen=decoder.params + _TOWER_WEIGHTS,
            tokens=tokens,
            image_tokens=answers * slots,
            flops=flops,
            memory=peak.peak_memory(
                machine,
                frozen=decoder.params + _TOWER_WEIGHTS,
                frozen_dtype=dtype,
                activations=cost.decoder_activations(decoder, **shape, gradients="none", attention="eager")
                + cost.logits_bytes(decoder, self.rows, gradients="none"),
                caches=cost.kv_cache_bytes(decoder, **shape) + features,
            ),
            disk_bytes=answers * 250,
            home_bytes=canvases * _CELLS * _FEATURE_WIDTH * 2,
            seconds=(low + seconds[0], high + seconds[1]),
            notes=(
                f"{answers:,} answers of {models} models, one after the other, counted with emoji questions, one round "
                f"of yes/no and {slots} tokens a picture; the time is that of answers at full length",
            ),
        )

    # --- inside ----------------------------------------------------------------------------------------------------

    def _expected(self, task: Task, pictures: int) -> int:
        """Questions of a test split with so many pictures."""
        there = _PER_PICTURE[task] * pictures if task in _PER_PICTURE else _CANVAS_QUESTIONS[task]
        return min(there, self._most(task))

    def _most(self, task: str) -> int:
        return {"name.en": self.max_names, "yesno": self.max_yes_no}.get(task, self.max_items)

    def _limit(self) -> dict[str, int]:
        """Longest answer in tokens, by task."""
        return dict.fromkeys(self.tasks, self.max_new_tokens) | {"yesno": min(_YES_NO_TOKENS, self.max_new_tokens)}

    def _ask(
        self, model: Path, data: Path, *, device: str, events: Events
    ) -> tuple[list[Sample], dict[str, dict[str, str]]]:
        """What is asked; and by system and sample the answers of the model, and of the model that sees nothing."""
        from plait.assembly.fit import SQUARE
        from plait.assembly.multimodal import load_multimodal
        from plait.evaluation.asking import ask, blanked, white_pictures
        from plait.inference.build import build_engine

        built = load_multimodal(model, events=events)
        questions = self._read(data, built, events)
        samples = [sample for split in questions.samples.values() for sample in split]
        self._say_long_answers(samples, built, events)
        white = white_pictures(built, dtype=questions.stores[0].dtype, others=questions.features)
        built.model.to(device)
        engine = build_engine(built, questions.features, rows=self.rows)
        said = {"model": ask(engine, samples, limit=self._limit(), task="answers", events=events)}
        if "blank" in self.baselines:
            engine = build_engine(built, white, rows=self.rows)
            few = [blanked(sample, sized=built.image.contract.fit != SQUARE) for sample in self._for_baselines(samples)]
            said["blank"] = ask(engine, few, limit=self._limit(), task="answers, blank picture", events=events)
        return samples, said

    def _ask_untuned(
        self, tuned: Path, data: Path, samples: Sequence[Sample], *, device: str, events: Events
    ) -> dict[str, str]:
        """Answers of the model before any training; the other one is gone by now."""
        from plait.assembly.multimodal import load_multimodal
        from plait.evaluation.asking import ask, untuned
        from plait.inference.build import build_engine

        gc.collect()
        built = untuned(load_multimodal(tuned, adapter=False, events=events), seed=self.seed)
        questions = self._read(data, built, Events())
        built.model.to(device)
        engine = build_engine(built, questions.features, rows=self.rows)
        few = self._for_baselines(samples)
        return ask(engine, few, limit=self._limit(), task="answers, untuned model", events=events)

    def _read(self, data: Path, built: Multimodal, events: Events) -> Questions:
        """The questions that are asked, with the features of their pictures; what is not asked is said."""
        from plait.assembly.questions import read_questions
        from plait.core.files import read_done

        done = read_done(data)
        made: dict[str, dict[str, int]] = done["summary"]["instruct"] if done else {}
        splits = [split for split in TESTS if set(made.get(split, {})) & set(self.tasks)]
        if not splits:
            raise DataError(
                f"no test split has a question of the tasks {', '.join(self.tasks)}",
                place=str(data),
                remedy="hold something out in the data stage (its card lists splits and tasks), or ask for other tasks",
            )
        questions = read_questions(
            data / "shards",
            splits,
            built.image,
            choose=self._choose,
            cache=home() / "features",
            events=events,
            audio=built.audio,
        )
        self._say_counts(made, questions, events)
        return questions

    def _choose(self, _: str, samples: Sequence[Sample]) -> list[Sample]:
        """Task by task, at most so many of each."""
        from plait.data.choice import spread

        tasks = dict.fromkeys(self.tasks)
        return [s for task in tasks for s in spread(samples, (task,), limit=self._most(task), seed=self.seed)]

    def _for_baselines(self, samples: Sequence[Sample]) -> list[Sample]:
        return [sample for sample in samples if sample.meta["task"] in self.baseline_tasks]

    def _say_counts(self, made: Mapping[str, Mapping[str, int]], questions: Questions, events: Events) -> None:
        asked = Counter((split, s.meta["task"]) for split, found in questions.samples.items() for s in found)
        wanted = [(split, task) for split in TESTS for task in dict.fromkeys(self.tasks)]
        missing = [f"{split}/{task}" for split, task in wanted if not asked[split, task]]
        if missing:
            absent = [split for split in TESTS if split not in questions.samples]
            parts = [f"all of {split}" for split in absent]
            parts += [part for part in missing if part.split("/")[0] not in absent]
            events.note(f"not asked, as the data stage made no such questions: {', '.join(parts)}", missing=missing)
        left = {f"{s}/{t}": made[s][t] - asked[s, t] for s, t in wanted if asked[s, t] and made[s][t] > asked[s, t]}
        if left:
            told = ", ".join(f"{count:,} of {part}" for part, count in left.items())
            events.note(f"left out by max_names, max_yes_no, max_items: {told}", left_out=left)
        events.note(f"{asked.total():,} questions of {len(questions.samples)} test splits")

    def _say_long_answers(self, samples: Sequence[Sample], built: Multimodal, events: Events) -> None:
        """Right answers that the model has no room to give."""
        from plait.evaluation.asking import target

        limit, tokenizer = self._limit(), built.language.tokenizer
        lengths = [(s.meta["task"], len(tokenizer(target(s), add_special_tokens=False).input_ids)) for s in samples]
        long = Counter(task for task, length in lengths if length > limit[task])
        if long:
            told = ", ".join(f"{count:,} of {task}" for task, count in long.items())
            longest = max(length for _, length in lengths)
            events.note(
                f"right answers longer than max_new_tokens={self.max_new_tokens}, which cannot be met: {told}; "
                f"the longest has {longest}",
                too_long=dict(long),
            )


def _training_answers(shards: Path) -> dict[str, list[str]]:
    """Right answers of the training questions, by task."""
    from plait.assembly.splits import PREFIX
    from plait.data.shards import ShardReader
    from plait.evaluation.asking import target

    answers: dict[str, list[str]] = {}
    with ShardReader(shards, f"{PREFIX}train") as reader:
        for sample in reader:
            answers.setdefault(sample.meta["task"], []).append(target(sample))
    return answers


def _retrieval(previous: Path | None) -> dict[str, float]:
    """What the pretrain stage measured, if there is one: the right name first, by split."""
    from plait.core.files import find_stage, read_done

    try:
        done = read_done(find_stage(previous, "pretrain"))
    except DataError:
        return {}
    return dict(done["summary"].get("recall_at_1", {})) if done else {}
