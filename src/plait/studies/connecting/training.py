"""The three small trainings: a decoder in words, a tower on cells, a connector between both when they are frozen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from plait.core.tensors import IGNORE, Batch, Patches
from plait.models.multimodal import MultimodalLM
from plait.studies.connecting import scenes
from plait.studies.connecting.parts import CELLS, Row, learning, make_batch
from plait.studies.connecting.scenes import IDS, Question, Scene
from plait.studies.connectors import ConnectorStudy, Kind, Language, Sight
from plait.training.optim import AdamW, Rates
from plait.training.schedule import Cosine

KINDS: tuple[Kind, ...] = get_args(Kind)
_ROWS = 250


def descend(
    weights: Mapping[str, nn.Parameter],
    losses: Callable[[], Tensor],
    *,
    steps: int,
    lr: float,
    parts: Mapping[str, float] | None = None,
) -> float:
    """AdamW without decay, 5 % warm-up, cosine to 0, gradients clipped at 1.

    Args:
        weights: That learn.
        losses: The loss of the next batch.
        steps: Updates.
        lr: Peak learning rate.
        parts: Beginning of names → a rate of their own.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    optimizer = AdamW().build(dict(weights), rates=Rates(lr=lr, parts=parts or {}))
    schedule = Cosine(warmup=0.05)
    seen: list[Tensor] = []
    for step in range(steps):
        loss = losses()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule.factor(step, steps)
        optimizer.step()
        seen.append(loss.detach())
    return float(torch.stack(seen[-max(1, steps // 10) :]).mean())


def answer_loss(model: MultimodalLM, batch: Batch) -> Tensor:
    """Cross-entropy of every word of every answer."""
    logits = model(batch).logits
    return functional.cross_entropy(logits, batch.labels[batch.labels != IGNORE])


def several(scene: Scene, count: int, rng: random.Random) -> list[Question]:
    """Questions of every kind in turn, in any order."""
    kinds: list[Kind] = [KINDS[i % len(KINDS)] for i in range(count)]
    rng.shuffle(kinds)
    asked = (scenes.ask(scene, kind, rng) for kind in kinds)
    return [question for question in asked if question is not None]


def in_words(scene: Scene) -> list[int]:
    """Ids of a scene's description."""
    return [IDS[word] for word in scenes.describe(scene)]


def train_language(model: MultimodalLM, settings: Language, rng: random.Random, *, batch: int) -> float:
    """Teach a decoder to answer about scenes in words; returns the mean loss of the last tenth of the steps."""

    def loss() -> Tensor:
        rows: list[Row] = []
        for _ in range(batch):
            scene = scenes.draw_scene(rng)
            rows.append((in_words(scene), several(scene, settings.asked, rng)))
        return answer_loss(model, make_batch(rows))

    found = descend(learning(model.decoder), loss, steps=settings.steps, lr=settings.lr)
    model.decoder.requires_grad_(requires_grad=False)
    return found


def train_tower(tower: nn.Module, settings: Sight, rng: random.Random, *, batch: int) -> tuple[nn.Module, float]:
    """Teach a tower what is in each cell and where that is, through two layers, the hidden one four times as wide.

    Returns:
        These two layers, of which no connector knows, and the mean loss of the last tenth of the steps.
    """
    d, told = settings.d, scenes.CLASSES + CELLS
    head = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, told))
    both = nn.ModuleList([tower, head])

    def loss() -> Tensor:
        drawn = [scenes.draw_scene(rng) for _ in range(batch)]
        found = tower(as_patches(scenes.pictures(drawn, seed=rng.getrandbits(32)))).values
        things, places = head(found).split([scenes.CLASSES, CELLS], dim=-1)
        what, where = scenes.labels(drawn).flatten(), torch.arange(CELLS).repeat(len(drawn))
        return functional.cross_entropy(things, what) + functional.cross_entropy(places, where)

    return head, descend(learning(both), loss, steps=settings.steps, lr=settings.lr)


def as_patches(pixels: Float[Tensor, "b h w c"]) -> Patches:
    """Pixels as the towers take them."""
    b, h, w, c = pixels.shape
    return Patches(values=pixels.reshape(-1, c), grid=torch.tensor([[1, h, w]]).expand(b, -1))


@torch.no_grad()
def features_of(tower: nn.Module, drawn: Sequence[Scene], *, seed: int) -> Float[Tensor, "b cells d"]:
    """What a tower makes of pictures of scenes."""
    pixels = scenes.pictures(list(drawn), seed=seed)
    found = [tower(as_patches(part)).values for part in pixels.split(_ROWS)]
    return torch.cat(found).unflatten(0, (-1, CELLS))


def train_connector(
    model: MultimodalLM,
    pool: tuple[Sequence[Scene], Tensor],
    study: ConnectorStudy,
    *,
    rng: random.Random,
    lr: float,
) -> float:
    """Teach a connector alone, by questions about pictures; returns the mean loss of the last tenth of the steps.

    Args:
        model: With a frozen tower and a frozen decoder.
        pool: Scenes, and the features of their pictures.
        study: Steps, pictures of each and questions about each.
        rng: Draws order and questions.
        lr: Peak learning rate.
    """
    drawn, features = pool
    slots = slots_of(model)

    def loss() -> Tensor:
        chosen = rng.sample(range(len(drawn)), min(study.batch, len(drawn)))
        rows: list[Row] = [(slots, several(drawn[i], study.asked, rng)) for i in chosen]
        return answer_loss(model, make_batch(rows, features[chosen]))

    weights = learning(model)
    gates = {name: study.gates * lr for name in weights if ".reads." in name and name.endswith("gate")}
    return descend(weights, loss, steps=study.steps, lr=lr, parts=gates)


def slots_of(model: MultimodalLM) -> list[int]:
    """Placeholders of a picture."""
    grid = torch.tensor([[1, scenes.SIDE, scenes.SIDE]])
    return [model.placeholder] * int(model.slots("image", grid))


def exam(rng: random.Random, kind: Kind, rows: int) -> list[tuple[Scene, Question]]:
    """Questions of one kind, each about a scene of its own."""

    def drawn() -> Iterator[tuple[Scene, Question]]:
        while True:
            scene = scenes.draw_scene(rng)
            question = scenes.ask(scene, kind, rng)
            if question is not None:
                yield scene, question

    return [pair for pair, _ in zip(drawn(), range(rows), strict=False)]


@torch.inference_mode()
def share_right(model: MultimodalLM, rows: Sequence[Row], features: Tensor | None) -> float:
    """Share of questions, one a row, of which every word of the answer gets the highest score of all words.

    With the right words before it, as in training: greedy answers are right in the same cases.
    """
    right = 0
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        batch = make_batch(part, None if features is None else features[start : start + _ROWS])
        logits = model(batch).logits
        assert logits is not None
        hits = (logits.argmax(-1) == batch.labels[batch.labels != IGNORE]).split([len(q[0].answer) for _, q in part])
        right += sum(bool(hit.all()) for hit in hits)
    return right / len(rows)
