"""Several ranks of one training step: ``python -m tests.unit.data.ranks IMAGE DECODER OUT``, started as torchrun does.

Each rank writes the gradients of its steps to ``OUT/<rank>.safetensors``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from plait.core import mesh
from plait.core.types import MediaRef
from plait.data.conversations import Conversation, ConversationBatches
from plait.data.features import FeatureStore
from plait.data.template import Rendered
from plait.objectives.language import NextToken
from plait.training.gradient import accumulate

STEPS = 8
SHORT = 6
"""From this step on both samples fit into one of the two rows."""
PICTURES = 4


def built(image: str, decoder: str) -> Any:
    """A tiny model; connector and decoder learn."""
    from plait.assembly.language import load_language
    from plait.assembly.multimodal import build_multimodal
    from plait.assembly.towers import load_image_tower
    from plait.models import specs
    from plait.models.composition import Connectors, PretrainedDecoder

    tower, language = load_image_tower(image, dtype="float32"), load_language(decoder, dtype="float32")
    torch.manual_seed(1)
    found = build_multimodal(
        {"image": tower},
        language,
        Connectors(image=specs.Mlp(shuffle=2)),
        decoder=PretrainedDecoder(name=decoder),
    )
    found.model.eval()
    for name, weight in found.model.named_parameters():
        weight.requires_grad = not name.startswith("encoders")
    return found


def source(model: Any, *, rank: int = 0, world: int = 1, pieces: int = 1) -> ConversationBatches:
    """Questions with a picture, longer ones without, and short ones without."""
    draw = torch.Generator().manual_seed(3)
    features = FeatureStore(model.image.encoder.d_out, torch.float32)
    conversations: list[Conversation] = []
    for number in range(PICTURES):
        sha256 = f"{number:064}"
        side = 4
        features.add(torch.randn(side * side, features.d_out, generator=draw), [(sha256, 1, side, side)])
        slots = int(model.model.slot_grid("image", torch.tensor([[1, side, side]])).prod())
        ref = MediaRef(modality="image", sha256=sha256, uri=f"{number}.png")
        picture = Rendered(
            token_ids=(*[model.model.placeholder] * slots, *_words(10, draw)),
            trained=(False,) * (slots + 7) + (True,) * 3,
            media=(ref,),
            slots=(slots,),
        )
        conversations.append(Conversation(id=f"p{number}", task="picture", rendered=picture))
        for task, length in (("text", slots + 18), ("short", 8)):
            words = _words(length, draw)
            rendered = Rendered(token_ids=words, trained=(False,) * (length - 2) + (True,) * 2, media=(), slots=())
            conversations.append(Conversation(id=f"{task}{number}", task=task, rendered=rendered))
    return ConversationBatches(
        conversations=conversations,
        weights={"picture": 1.0, "text": 1.0},
        late=(SHORT, {"short": 1.0}),
        stores=[features],
        grid_out=model.accounts,
        batch_size=2,
        row=max(len(c.rendered) for c in conversations),
        pad=model.stop,
        steps=STEPS,
        seed=0,
        rank=rank,
        world=world,
        pieces=pieces,
    )


def _words(count: int, draw: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(200, (count,), generator=draw).tolist())


def gradients(model: nn.Module, batches: ConversationBatches, step: int) -> dict[str, torch.Tensor]:
    """Of one step, and its loss."""
    model.zero_grad(set_to_none=True)
    sums = accumulate(model, NextToken(), batches.step_batches(step), weights={})
    found = {
        f"{step} {name}": torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    return found | {f"{step} loss": torch.tensor(sums.loss), f"{step} count": torch.tensor(sums.counts["next_token"])}


def main(image: str, decoder: str, out: str) -> None:
    torch.set_num_threads(1)
    model = built(image, decoder)
    with mesh.joined():
        batches = source(model, rank=mesh.rank(), world=mesh.world())
        found: dict[str, torch.Tensor] = {}
        for step in range(STEPS):
            found |= gradients(model.model, batches, step)
        save_file(found, Path(out) / f"{mesh.rank()}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
