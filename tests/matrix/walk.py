"""One composition, walked: built, trained for two steps, saved, loaded with equal scores, generated from."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from plait.assembly.compose import compose
from plait.assembly.multimodal import Multimodal, holds_media, load_multimodal, save_multimodal
from plait.core.tensors import Batch, Patches
from plait.core.types import MediaRef, Request, Sample, Text, Turn
from plait.data.collate import collate
from plait.inference.build import build_engine, encode_pictures
from plait.models.composition import Composition
from plait.objectives.language import NextToken
from tests.matrix.cases import SIZE

COLORS = ("red", "green", "blue")


def walk(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Walk a composition; raises where it does not hold.

    Returns:
        What it was like: weights, trained weights, tokens and places of a picture, losses of the steps.
    """
    torch.manual_seed(0)
    built = compose(Composition.model_validate(given))
    batch = questions(built)
    losses = train(built, batch)
    assert all(loss == loss and loss < 100 for loss in losses), losses
    built.model.eval()
    folder.mkdir()
    save_multimodal(built, folder)
    loaded = load_multimodal(folder)
    with torch.inference_mode():
        ours, theirs = (one.model(batch).logits for one in (built, loaded))
    assert torch.equal(ours, theirs), float((ours - theirs).abs().max())
    said = [answers(one) for one in (built, loaded)]
    assert said[0] == said[1]
    assert all(said[0]), "an answer has no token"
    return {
        "weights": sum(weight.numel() for weight in built.model.parameters()),
        "trained": sum(weight.numel() for weight in built.model.parameters() if weight.requires_grad),
        "tokens": built.tokens_per_picture,
        "places": built.slots_per_picture,
        "losses": [round(loss, 4) for loss in losses],
    }


def train(built: Multimodal, batch: Batch) -> list[float]:
    """Two steps; every part that may learn must move, every frozen one must not. Losses before, between and after."""
    model, objective = built.model, NextToken()
    before = {name: value.clone() for name, value in model.named_parameters()}
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.0)
    losses: list[float] = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = objective(model, batch)["next_token"] / objective.count(batch)["next_token"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(float(objective(model, batch)["next_token"] / objective.count(batch)["next_token"]))
    for part, mine in PARTS.items():
        names = [name for name in before if mine(name)]
        moved = [name for name in names if not torch.equal(before[name], model.get_parameter(name))]
        wanted = [name for name in names if model.get_parameter(name).requires_grad]
        assert bool(moved) == bool(wanted), f"{part}: {len(moved)} of {len(wanted)} learning weights moved"
    return losses


PARTS: dict[str, Callable[[str], bool]] = {
    "encoder": lambda name: name.startswith("encoders."),
    "connector": holds_media,
    "decoder": lambda name: name.startswith("decoder.") and ".reads." not in name,
}


def picture(color: str) -> bytes:
    """A PNG, wider than high."""
    drawn = Image.effect_noise((SIZE + 8, SIZE), 60).convert("RGB")
    out = io.BytesIO()
    Image.blend(drawn, Image.new("RGB", drawn.size, color), 0.7).save(out, "PNG")
    return out.getvalue()


PICTURES = {color: picture(color) for color in COLORS}


def turns(*colors: str) -> tuple[Turn, ...]:
    """A question about pictures."""
    refs = (MediaRef(modality="image", sha256=color, uri=color, width=SIZE + 8, height=SIZE) for color in colors)
    return (Turn(role="user", parts=(*refs, Text(text="color?"))),)


def questions(built: Multimodal) -> Batch:
    """Raw pixels: one picture, two, and none, packed into rows."""
    template, prepare = built.template, encode_raw(built)
    samples = []
    for colors in (("red",), ("green", "blue"), ()):
        answer = Turn(role="assistant", parts=(Text(text=" ".join(colors) or "none"),), trained=True)
        name = "-".join(colors) or "text"
        samples.append((name, template.sample(Sample(id=name, turns=(*turns(*colors), answer)))))
    encoder = built.image.encoder
    return collate(
        samples,
        {color: prepare(color) for color in COLORS},
        grid_out=lambda grid: built.slot_grid(encoder.grid_out(grid)),
        encoded=False,
        row=max(len(rendered) for _, rendered in samples) + 20,
        pad=built.stop,
    )


def encode_raw(built: Multimodal) -> Callable[[str], Patches]:
    """A picture's pixels by the model's own contract."""

    def prepare(color: str) -> Patches:
        with Image.open(io.BytesIO(PICTURES[color])) as opened:
            return built.image.prepare(opened.convert("RGB"))

    return prepare


def answers(built: Multimodal) -> list[tuple[int, ...]]:
    """Ids of answers to a picture, two pictures and none; the end of an answer counts as one."""
    engine = build_engine(built, encode_pictures(built, lambda ref: PICTURES[ref.uri]))
    asked = [("red",), ("green", "blue"), ()]
    found = engine([Request(id=str(colors), turns=turns(*colors), max_new_tokens=4) for colors in asked])
    return [(*one.token_ids, *([built.stop] if one.finish == "stop" else [])) for one in found]
