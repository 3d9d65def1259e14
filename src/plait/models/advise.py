"""Which encoder of pictures: candidates with what they cost here, rules with their evidence, and the order they give.

Nothing is claimed that was not counted, measured on this machine, or published; every rule says which.
"""

import copy
import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from plait.core.device import Compute, fingerprint
from plait.core.errors import DataError, PlaitError
from plait.core.files import read_json, write_json
from plait.core.speed import interleaved
from plait.core.tensors import Patches
from plait.models import specs
from plait.models.build import build_encoder
from plait.models.measure import Account, account, peak_bytes

Task = Literal["classify", "retrieve", "generate", "dense"]
Family = Literal["convolutions", "both", "attention", "unknown"]
IMAGENET = 1_281_167
"""Pictures of ImageNet-1k, with which published accuracies were reached."""
MIB = 2**20
ENOUGH = 3
"""Rounds from which on a median is kept for later calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What an encoder is wanted for.

    Attributes:
        size: Pixels a side.
        batch: Pictures that go through together.
        task: What its features are for.
        latency_ms: Most milliseconds a picture; 0: no limit.
        memory_mib: Most memory; 0: no limit.
        train_pictures: Pictures that there are to train on; None: not said.
    """

    size: int = 224
    batch: int = 1
    task: Task = "classify"
    latency_ms: float = 0.0
    memory_mib: float = 0.0
    train_pictures: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An encoder that may be advised.

    Attributes:
        name: As it is printed.
        settings: What tells it from others, in the cache too.
        build: Makes it, for the CPU.
        family: What it is made of.
        pretrained: Whether its weights are trained, and would stay as they are.
        with_text: Whether they were trained with texts, as CLIP's.
        top1: Published accuracy on ImageNet-1k at 224 pixels, in percent; 0: none known.
        source: Of that figure.
    """

    name: str
    settings: Mapping[str, Any]
    build: Callable[[], nn.Module]
    family: Family
    pretrained: bool = False
    with_text: bool = False
    top1: float = 0.0
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds a picture.

    Attributes:
        median: Of the rounds.
        least: Of the rounds.
        most: Of the rounds.
        rounds: How many.
        date: When it was measured.
        cached: Whether that was in an earlier call.
    """

    median: float
    least: float
    most: float
    rounds: int
    date: str
    cached: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What orders candidates, and why.

    Attributes:
        says: The rule.
        evidence: What it rests on.
        source: Where that is from: this machine, this project, or a paper.
    """

    says: str
    evidence: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A candidate with its costs.

    Attributes:
        candidate: It.
        status: ``fits``; ``over`` a limit; ``unmeasured``, where a limit on time cannot be checked; or ``refused``.
        why: What it exceeds, by how much, or why it cannot be.
        account: Counted costs of one picture.
        memory_bytes: Weights and activations of a batch; where it would be trained, gradients and Adam's moments too.
        scales: Maps of different sizes that it gives.
        timing: Measured here.
    """

    candidate: Candidate
    status: Literal["fits", "over", "unmeasured", "refused"] = "fits"
    why: str = ""
    account: Account | None = None
    memory_bytes: int = 0
    scales: int = 1
    timing: Timing | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = {name: getattr(self.candidate, name) for name in ("name", "settings", "family", "pretrained")}
        plain |= {"published_top1": self.candidate.top1 or None, "published_source": self.candidate.source or None}
        plain |= {"status": self.status, "why": self.why, "memory_bytes": self.memory_bytes, "scales": self.scales}
        plain |= {"cost": None if self.account is None else asdict(self.account)}
        return plain | {"ms_per_picture": None if self.timing is None else asdict(self.timing)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """How candidates are timed.

    Attributes:
        compute: Device, number format and threads.
        cache: Folder of earlier figures.
        seconds: For all of them together.
        again: Measure anew what is known.
    """

    compute: Compute
    cache: Path
    seconds: float = 20.0
    again: bool = False


# --- candidates ------------------------------------------------------------------------------------------------------

_RSB, _DEIT = "https://arxiv.org/abs/2110.00476", "https://arxiv.org/abs/2012.12877"
_LITE = "https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite"
_SCRATCH: tuple[tuple[str, specs.Part, Family, float, str], ...] = (
    ("efficientnet-lite0", specs.EfficientNetLite(), "convolutions", 75.1, _LITE),
    ("vit-ti/16", specs.ViT(d=192, heads=3), "attention", 72.2, _DEIT),
    ("resnet-18", specs.ResNet(depth=18), "convolutions", 71.5, f"{_RSB}, recipe A1"),
    ("resnet-50", specs.ResNet(depth=50), "convolutions", 80.4, f"{_RSB}, recipe A1"),
    ("hybrid-s/16", specs.Hybrid(), "both", 79.8, f"{_DEIT}, the same width without convolutions"),
    ("coatnet-0", specs.CoAtNet(), "both", 81.6, "https://arxiv.org/abs/2106.04803, whose form it has"),
    ("swin-t", specs.Swin(), "attention", 81.3, "https://arxiv.org/abs/2103.14030"),
    ("vit-s/16", specs.ViT(), "attention", 79.8, _DEIT),
    ("vit-b/16", specs.ViT(d=768, heads=12), "attention", 81.8, _DEIT),
)


def scratch_candidates(size: int) -> list[Candidate]:
    """Encoders from scratch, at sizes of the literature."""
    return [
        Candidate(
            name=name,
            settings=spec.model_copy(update={"size": size}).model_dump(mode="json"),
            build=partial(build_encoder, spec.model_copy(update={"size": size})),
            family=family,
            top1=top1,
            source=source,
        )
        for name, spec, family, top1, source in _SCRATCH
    ]


_CONVOLUTIONAL = ("EfficientNetLite", "ConvNext", "ResNet", "RegNet", "DINOv3ConvNext")
_WITH_TEXT = ("clip", "metaclip", "siglip", "mlcd", "aimv2")


def pretrained_candidate(name: str, encoder: nn.Module, *, settings: Mapping[str, Any]) -> Candidate:
    """A tower whose weights are trained.

    Args:
        name: As it is printed.
        encoder: Frozen.
        settings: What tells it from others.
    """
    backbone = getattr(encoder, "backbone", encoder)
    kind = str(getattr(getattr(backbone, "config", None), "model_type", ""))
    convolutional = any(word.lower() in type(backbone).__name__.lower() for word in _CONVOLUTIONAL)
    lite = type(backbone).__name__ == "EfficientNetLite"
    return Candidate(
        name=name,
        settings=settings,
        build=lambda: encoder,
        family="convolutions" if convolutional else "unknown" if not kind else "attention",
        pretrained=True,
        with_text=kind.startswith(_WITH_TEXT),
        top1=75.1 if lite else 0.0,
        source=_LITE if lite else "",
    )


# --- costs -----------------------------------------------------------------------------------------------------------


def judge(candidates: Sequence[Candidate], need: Need, clock: Clock) -> list[Judged]:
    """Count, time and compare with the limits; in the order of :func:`ranked`."""
    counted = [_counted(candidate, need) for candidate in candidates]
    alive = [found for found in counted if found.status != "refused"]
    # The cheapest are timed first: if time runs out, it is the largest that stay unmeasured.
    timings = _timed(sorted(alive, key=lambda found: found.account.flops if found.account else 0), need, clock)
    judged = [_limited(found, timings.get(found.candidate.name), need) for found in counted]
    return ranked(judged, need)


def _counted(candidate: Candidate, need: Need) -> Judged:
    def build() -> nn.Module:
        # Weights that are loaded already do not move: a copy without numbers is counted.
        return copy.deepcopy(candidate.build()).to("meta") if candidate.pretrained else candidate.build()

    try:
        found = account(build, need.size)
        activations = peak_bytes(build, need.size, pictures=need.batch)
        with torch.device("meta"):
            encoder = build()
            weights = sum(p.numel() * p.element_size() for p in encoder.parameters())
            scales = _scales(encoder, need.size)
    except (PlaitError, RuntimeError) as error:
        cause = error.cause if isinstance(error, PlaitError) else str(error).partition("\n")[0]
        return Judged(candidate=candidate, status="refused", why=f"cannot be at {need.size} pixels: {cause}")
    memory = weights + activations
    if need.train_pictures and not candidate.pretrained:
        # Weights, gradients and Adam's two moments in float32, and what the backward pass needs of a batch.
        memory = 16 * found.trainable + need.batch * found.kept_bytes
    return Judged(candidate=candidate, account=found, memory_bytes=memory, scales=scales)


def _scales(encoder: nn.Module, size: int) -> int:
    stages: Any = getattr(encoder, "stages", None)
    if not callable(stages):
        return 1
    with torch.no_grad():
        found: Any = stages(torch.zeros(2, 3, size, size))
    return len({tuple(grid.shape[2:]) for grid in found})


def _limited(found: Judged, timing: Timing | None, need: Need) -> Judged:
    if found.status == "refused":
        return found
    over: list[str] = []
    if need.memory_mib and found.memory_bytes > need.memory_mib * MIB:
        over.append(f"{found.memory_bytes / MIB:,.0f} MiB, the limit is {need.memory_mib:,.0f}")
    if need.latency_ms and timing is not None and timing.median > need.latency_ms:
        over.append(f"{timing.median:,.1f} ms a picture, the limit is {need.latency_ms:,.1f}")
    status, why = "over" if over else "fits", "; ".join(over)
    if not over and timing is None and need.latency_ms:
        status, why = "unmeasured", "no time was left to measure it: give more --seconds"
    made = {"candidate": found.candidate, "account": found.account, "memory_bytes": found.memory_bytes}
    return Judged(**made, status=status, why=why, scales=found.scales, timing=timing)


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """One candidate's forward pass; made when it is first called."""

    build: Callable[[], nn.Module]
    media: Patches
    compute: Compute
    model: nn.Module | None = field(default=None)

    def __call__(self) -> None:
        if self.model is None:
            # Weights of any numbers do; the caller's generator stays where it was.
            with torch.random.fork_rng(devices=[]):
                made = self.build()
            self.model = made.to(self.compute.device, getattr(torch, self.compute.dtype)).eval()
        with torch.inference_mode():
            self.model(self.media)
        if self.compute.device == "cuda":
            torch.cuda.synchronize()


def _timed(found: Sequence[Judged], need: Need, clock: Clock) -> dict[str, Timing]:
    paths = {f.candidate.name: clock.cache / f"{_key(f.candidate, need, clock.compute)}.json" for f in found}
    known = {} if clock.again else {name: timing for name, path in paths.items() if (timing := _read(path))}
    grid = torch.tensor([[1, need.size, need.size]] * need.batch)
    pixels = torch.rand(need.batch * need.size**2, 3, generator=torch.Generator().manual_seed(0))
    media = Patches(values=pixels.to(clock.compute.device), grid=grid)
    clock.cache.mkdir(parents=True, exist_ok=True)
    # Figures of one moment are compared: where one is missing, all are measured anew, and earlier ones stand in only
    # for those that no time is left for.
    complete = len(known) == len(found)
    calls = {f.candidate.name: _Run(f.candidate.build, media, clock.compute) for f in found if not complete}
    today = datetime.date.today().isoformat()
    for name, times in interleaved(calls, seconds=clock.seconds).items():
        median, least, most = (1e3 * t / need.batch for t in (times.median, times.least, times.most))
        known[name] = Timing(median=median, least=least, most=most, rounds=times.rounds, date=today)
        if times.rounds >= ENOUGH:
            write_json(paths[name], asdict(known[name]))
    return known


def _key(candidate: Candidate, need: Need, compute: Compute) -> str:
    """Digest of the machine, versions and everything that makes the work another."""
    what = {
        "machine": fingerprint(compute),
        "settings": dict(candidate.settings),
        "pretrained": candidate.pretrained,
        "size": need.size,
        "batch": need.batch,
        "code": 1,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _read(path: Path) -> Timing | None:
    """Figures of an earlier call; a file that is none is measured anew."""
    if not path.is_file():
        return None
    try:
        found: Any = read_json(path)
        return Timing(**{**found, "cached": True})
    except (DataError, TypeError):
        return None


# --- order -----------------------------------------------------------------------------------------------------------

_FEW = Rule(
    says="with fewer pictures than ImageNet-1k: pretrained ones first, then convolutions, then both, then attention",
    evidence="ViT without strong regularization is a few points below ResNets of its size on ImageNet-1k (section 1); "
    "attention generalizes worse than convolutions for want of their bias (CoAtNet, abstract); in our own run on 1,127 "
    "pictures a small ViT from scratch found the right name of new things for 9.0 % of 200, the frozen pretrained "
    "EfficientNet-Lite0 for 20.0 % (one seed)",
    source="https://arxiv.org/abs/2010.11929; https://arxiv.org/abs/2106.04803; CHANGELOG.md",
)
_DENSE = Rule(
    says="dense tasks: those with maps of several sizes first",
    evidence="Swin-T beats DeiT-S, whose maps have one size, by 2.5 points of box AP in Cascade Mask R-CNN (table 2); "
    "contrary: plain ViTs can do as well with a simple pyramid on their last map (ViTDet, abstract)",
    source="https://arxiv.org/abs/2103.14030; https://arxiv.org/abs/2203.16527",
)
_TEXT = Rule(
    says="retrieval and generation: towers pretrained with texts first",
    evidence="towers trained without texts are behind CLIP's in visual question answering; contrary: the same paper "
    "finds that with more data and weights they catch up (abstract)",
    source="https://arxiv.org/abs/2504.01017",
)
_ACCURACY = Rule(
    says="by published ImageNet-1k accuracy at 224 pixels, in whole points",
    evidence="each figure's source stands beside it; recipes of training differ between papers, and none was run here",
    source="the column top-1",
)
_SPEED = Rule(
    says="the fastest first",
    evidence="median of rounds that go over all candidates in turn, random pixels, no gradients",
    source="measured on this machine",
)


def rules(need: Need) -> list[Rule]:
    """Those that apply, in the order in which they decide."""
    few = [_FEW] if need.train_pictures is not None and need.train_pictures < IMAGENET else []
    task = {"dense": [_DENSE], "retrieve": [_TEXT], "generate": [_TEXT], "classify": []}[need.task]
    return [*few, *task, _ACCURACY, _SPEED]


def ranked(found: Sequence[Judged], need: Need) -> list[Judged]:
    """What fits first, by the rules; then what is over a limit, unmeasured, refused."""
    applied = rules(need)
    kinds = ("fits", "over", "unmeasured", "refused")
    families = ("convolutions", "both", "attention", "unknown")

    def key(one: Judged) -> tuple[int, int, int, int, float]:
        it = one.candidate
        few = 0 if _FEW not in applied or it.pretrained else 1 + families.index(it.family)
        task = 0
        if _DENSE in applied:
            task = 0 if one.scales > 1 else 1
        elif _TEXT in applied:
            task = 0 if it.with_text else 1
        speed = one.timing.median if one.timing else float("inf")
        return kinds.index(one.status), few, task, -round(it.top1), speed

    return sorted(found, key=key)
