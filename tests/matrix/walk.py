"""One composition, walked: built, trained for two steps, saved, loaded with equal scores, generated from."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from plait.assembly.compose import compose
from plait.assembly.media_towers import read_media
from plait.assembly.multimodal import Multimodal, holds_media, load_multimodal, save_multimodal
from plait.core.tensors import Batch, Patches
from plait.core.types import MediaRef, Modality, Request, Sample, Text, Turn
from plait.data.collate import collate
from plait.data.speech import encode_wav
from plait.inference.build import build_engine, encode_pictures
from plait.models.composition import Composition
from plait.objectives.language import NextToken
from tests.matrix.cases import SIZE
from tests.tiny_videos import video

COLORS = ("red", "green", "blue")


def walk(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Walk a composition; raises where it does not hold.

    Returns:
        What it was like: weights, trained weights, tokens and places of a medium, losses of the steps.
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
        **counts(built),
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
        assert set(moved) <= set(wanted), f"{part}: frozen weights moved, such as {moved[0]}"
        # Not all: poolers and classifiers are not asked, and behind a gate that starts at 0 one step moves nothing.
        assert len(moved) >= len(wanted) / 2, f"{part}: {len(moved)} of {len(wanted)} learning weights moved"
    return losses


PARTS: dict[str, Callable[[str], bool]] = {
    "encoder": lambda name: name.startswith("encoders."),
    "connector": holds_media,
    "decoder": lambda name: name.startswith("decoder.") and ".reads." not in name,
}


def counts(built: Multimodal) -> dict[str, int]:
    """What the connector makes of the first medium, and how many placeholders stand for it."""
    (modality,) = built.towers
    tower, connector = built.towers[modality], built.model.connectors[modality]
    cells = tower.encoder.grid_out(prepared(built, "red").grid)
    tokens = connector.grid_out(cells)  # pyright: ignore[reportCallIssue]
    return {"tokens": int(tokens.prod()), "places": int(built.model.slots(modality, cells))}


def picture(color: str) -> bytes:
    """A PNG, wider than high."""
    drawn = Image.effect_noise((SIZE + 8, SIZE), 60).convert("RGB")
    out = io.BytesIO()
    Image.blend(drawn, Image.new("RGB", drawn.size, color), 0.7).save(out, "PNG")
    return out.getvalue()


def sound(samples: int) -> bytes:
    """A WAV of noise."""
    return encode_wav(np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32), 16_000)


SAMPLES = dict(zip(COLORS, (4_800, 3_200, 8_000), strict=True))
FRAMES = dict(zip(COLORS, (7, 2, 12), strict=True))
MEDIA: dict[Modality, dict[str, bytes]] = {
    "image": {color: picture(color) for color in COLORS},
    "audio": {color: sound(SAMPLES[color]) for color in COLORS},
    "video": {color: video(FRAMES[color], seed=n, size=(SIZE + 8, SIZE)) for n, color in enumerate(COLORS)},
}


def turns(modality: Modality, *colors: str) -> tuple[Turn, ...]:
    """A question about media."""
    size = {"width": SIZE + 8, "height": SIZE}
    about = {
        "image": lambda _: size,
        "audio": lambda color: {"length": SAMPLES[color]},
        "video": lambda color: size | {"length": FRAMES[color]},
    }[modality]
    refs = (MediaRef(modality=modality, sha256=color, uri=color, **about(color)) for color in colors)
    return (Turn(role="user", parts=(*refs, Text(text="color?"))),)


def prepared(built: Multimodal, color: str) -> Patches:
    """A medium as its tower takes it, by the model's own contract."""
    (modality,) = built.towers
    return read_media(built.towers[modality], MEDIA[modality][color], place=color)


def questions(built: Multimodal) -> Batch:
    """Raw media: one, two, and none, packed into rows."""
    (modality,) = built.towers
    template = built.template
    samples = []
    for colors in (("red",), ("green", "blue"), ()):
        answer = Turn(role="assistant", parts=(Text(text=" ".join(colors) or "none"),), trained=True)
        name = "-".join(colors) or "text"
        samples.append((name, template.sample(Sample(id=name, turns=(*turns(modality, *colors), answer)))))
    return collate(
        samples,
        {color: prepared(built, color) for color in COLORS},
        grid_out=built.raw_accounts,
        encoded=False,
        row=max(len(rendered) for _, rendered in samples) + 20,
        pad=built.stop,
    )


def answers(built: Multimodal) -> list[tuple[int, ...]]:
    """Ids of answers to one medium, two and none; the end of an answer counts as one."""
    (modality,) = built.towers
    engine = build_engine(built, encode_pictures(built, lambda ref: MEDIA[modality][ref.uri]))
    asked = [("red",), ("green", "blue"), ()]
    found = engine([Request(id=str(c), turns=turns(modality, *c), max_new_tokens=4) for c in asked])
    return [(*one.token_ids, *([built.stop] if one.finish == "stop" else [])) for one in found]
