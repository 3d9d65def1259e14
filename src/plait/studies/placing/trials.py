"""Every code with every seed, in processes of one thread each, and the scores of all of them."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch

from plait.core.events import Events
from plait.evaluation.statistics import seeds_score
from plait.models.position.absolute import LearnedGrid, LearnedRowColumn, SinCosGrid, SinCosSequence
from plait.models.transformer import TransformerSizes
from plait.studies.placing.codes import Code, Sides, Width, grid_code, sequence_code
from plait.studies.placing.reader import Reader, Training, answers, train
from plait.studies.placing.tasks import Task, grid_task, sequence_task
from plait.studies.placing.topology import Topology, topology
from plait.studies.positions import Positions
from plait.studies.workers import finished, one_thread

Family = Literal["sequence", "grid"]

_TEST_SEED = 1_000_003
"""Far from the seeds of training; the same for all codes and seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One training and what came of it.

    Attributes:
        family: Sequences or grids.
        code: Name of the code.
        seed: Of weights and questions.
        loss: Mean of the last tenth of the steps.
        cpu_s: Processor seconds it took.
        right: (multiple of the training size, question) → share of right answers, and their number.
        topology: Of the trained vectors of a grid, where there are any.
    """

    family: Family
    code: str
    seed: int
    loss: float
    cpu_s: float
    right: dict[tuple[int, str], tuple[float, int]]
    topology: Topology | None


def trial(study: Positions, work: tuple[Family, str, int]) -> Trial:
    """Train one reader and ask it at all sizes.

    Args:
        study: The settings.
        work: Family, code and seed.
    """
    family, code, seed = work
    begun = time.process_time()
    with one_thread():
        torch.manual_seed(seed)
        task, sides, steps, times = _setting(study, family)
        sizes = TransformerSizes(d=study.d, depth=study.depth, heads=study.heads, d_ff=2 * study.d)
        reader = Reader(sizes, _code(study, family, code), task)
        loss = train(reader, sides, Training(steps=steps, batch=study.batch, lr=study.lr), seed=seed)
        right: dict[tuple[int, str], tuple[float, int]] = {}
        for factor in times:
            larger = tuple(side * factor for side in sides)
            for question, marks in answers(reader, larger, rows=study.rows, seed=_TEST_SEED).items():
                right[factor, question] = (sum(marks) / len(marks), len(marks))
        found = _topology_of(reader, sides)
    return Trial(
        family=family,
        code=code,
        seed=seed,
        loss=loss,
        cpu_s=time.process_time() - begun,
        right=right,
        topology=found,
    )


def collect(study: Positions, *, events: Events) -> dict[str, Any]:
    """All trials, scored: plain data."""
    begun = time.monotonic()
    done = sorted(_trials(study, events), key=lambda t: (t.family, t.code, t.seed))
    for one in done:
        if not math.isfinite(one.loss):
            events.warning(f"{one.code} on {one.family} diverged with seed {one.seed}: its answers count as they are")
    scores: list[dict[str, Any]] = []
    for family, code in _codes(study):
        scores += _scores(study, [t for t in done if (t.family, t.code) == (family, code)])
    return {
        "study": study.name,
        "spec": study.model_dump(mode="json"),
        "scores": scores,
        "losses": [{"family": t.family, "code": t.code, "seed": t.seed, "loss": t.loss} for t in done],
        "topology": _topologies(study, done),
        "trained": len(done),
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(sum(t.cpu_s for t in done), 1),
        "torch": str(torch.__version__),
    }


def _trials(study: Positions, events: Events) -> Iterator[Trial]:
    codes = _codes(study)
    work: list[tuple[Family, str, int]] = [
        (family, code, seed) for seed in range(study.seeds) for family, code in codes
    ]
    return finished(partial(trial, study), work, workers=study.workers, events=events)


def _topology_of(reader: Reader, sides: Sides) -> Topology | None:
    table = reader.code.added(sides)
    if len(sides) == 2 and isinstance(table, torch.Tensor) and table.requires_grad:
        return topology(table, rows=sides[0], columns=sides[1])
    return None


def _codes(study: Positions) -> list[tuple[Family, str]]:
    named: list[tuple[Family, str]] = [("sequence", code) for code in study.sequence.codes]
    return [*named, *(("grid", code) for code in study.grid.codes)]


def _setting(study: Positions, family: Family) -> tuple[Task, Sides, int, Sequence[int]]:
    if family == "sequence":
        part = study.sequence
        return sequence_task(words=part.words, offset=part.offset), (part.length,), part.steps, part.times
    return grid_task(), (study.grid.side, study.grid.side), study.grid.steps, study.grid.times


def _code(study: Positions, family: Family, name: str) -> Code:
    width = Width(d=study.d, heads=study.heads)
    if family == "sequence":
        return sequence_code(name, width, length=study.sequence.length)
    return grid_code(name, width, side=study.grid.side)


def _scores(study: Positions, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    first = trials[0]
    task, sides, _, _ = _setting(study, first.family)
    found: list[dict[str, Any]] = []
    for factor, question in first.right:
        shares = [one.right[factor, question][0] for one in trials]
        # Of a sequence several tokens may be asked, and all seeds are asked the same sequences.
        score = seeds_score(shares, name=f"{first.family}/{question}", rule="accuracy", n=study.rows)
        found.append(
            {
                "family": first.family,
                "code": first.code,
                "question": question,
                "times": factor,
                "sides": [side * factor for side in sides],
                **asdict(score),
                "seeds": shares,
                "chance": task.chance[question],
            }
        )
    return found


def _topologies(study: Positions, done: Sequence[Trial]) -> list[dict[str, Any]]:
    """Of tables before any training on a grid of twice the side, and of those learned here at their own side."""
    side = 2 * study.grid.side
    torch.manual_seed(0)
    with torch.no_grad():
        tables = {
            "sincos-2d": SinCosGrid(study.d)(side, side),
            "sincos in raster order": SinCosSequence(study.d)(side * side),
            "rows + columns, random": LearnedRowColumn(side, side, study.d)(side, side),
            "learned-2d, random": LearnedGrid(side, side, study.d)(side, side),
        }
    found = [
        {"table": name, "side": side, **asdict(topology(t, rows=side, columns=side))} for name, t in tables.items()
    ]
    for one in done:
        if one.topology is not None:
            name = f"{one.code}, trained, seed {one.seed}"
            found.append({"table": name, "side": study.grid.side, **asdict(one.topology)})
    return found
