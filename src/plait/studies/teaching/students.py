"""What learns: a tower with a head on its cells or on their mean, and a pair of towers with a fusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.core.tensors import IGNORE, Batch
from plait.models import fusion_specs
from plait.models.attention import ANYWHERE
from plait.models.build_fusion import build_fusion
from plait.models.fusion.missing import ModalityDropout
from plait.models.fusion.streams import only, vector
from plait.models.towers.vit import VisionTransformer, ViTSizes
from plait.models.transformer import Transformer, TransformerSizes
from plait.studies.connecting.scenes import PIXELS, WORDS

Modality = Literal["image", "text"]
BOTH: tuple[Modality, ...] = ("image", "text")


def tower(*, d: int, depth: int, heads: int, patch: int = PIXELS, side: int = 4) -> VisionTransformer:
    """A ViT without a class token.

    Args:
        d: Width.
        depth: Blocks.
        heads: Of attention.
        patch: Pixels a side of a patch.
        side: Patches a side of a picture.
    """
    inner = TransformerSizes(d=d, depth=depth, heads=heads)
    return VisionTransformer(
        ViTSizes(transformer=inner, patch=patch, grid=(side, side), class_token=False, pool="mean")
    )


class Reader(nn.Module):
    """A tower and a linear layer.

    Args:
        tower: Of pictures.
        classes: To tell apart.
        of: ``cells``: a class for each patch; ``picture``: one for the mean of them.
    """

    def __init__(self, tower: VisionTransformer, classes: int, *, of: Literal["cells", "picture"]) -> None:
        super().__init__()
        self.tower, self.of = tower, of
        self.head = nn.Linear(tower.d_out, classes)

    def forward(self, batch: Batch) -> Float[Tensor, "n c"]:
        """Scores."""
        found = self.tower(batch.media["image"]).values
        return self.head(found if self.of == "cells" else found.unflatten(0, (len(batch.sample_ids), -1)).mean(1))


class Pair(nn.Module):
    """A tower of pictures and one of words, and a fusion that works without either.

    Args:
        d: Width of both.
        depth: Blocks of the tower of pictures; that of words has one.
        heads: Of attention.
        classes: To tell apart.

    Attributes:
        reads: What is looked at: both through the fusion, or one modality through a head of its own.
        dropped: While training through the fusion, the probability of dropping each modality of a sample.
        still: Whether towers are run without gradients.
    """

    def __init__(self, *, d: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.image = tower(d=d, depth=depth, heads=heads)
        self.words = nn.Embedding(len(WORDS), d)
        self.text = Transformer(TransformerSizes(d=d, depth=1, heads=heads))
        fusion = build_fusion(fusion_specs.Concat(d_out=d), dict.fromkeys(BOTH, d))
        assert isinstance(fusion, nn.Module)
        self.fusion = fusion
        self.head = nn.Sequential(nn.GELU(), nn.Linear(d, classes))
        self.own = nn.ModuleDict({name: nn.Linear(d, classes) for name in BOTH})
        self.reads: tuple[Modality, ...] = BOTH
        self.dropped, self.still = 0.0, False

    def parts(self, reads: tuple[Modality, ...]) -> tuple[nn.Module, ...]:
        """What learns where the towers of these modalities do, with the head behind them."""
        towers: Mapping[Modality, tuple[nn.Module, ...]] = {"image": (self.image,), "text": (self.words, self.text)}
        heads = (self.fusion, self.head) if reads == BOTH else tuple(self.own[name] for name in reads)
        return (*(part for name in reads for part in towers[name]), *heads)

    def encode(self, name: Modality, batch: Batch) -> Float[Tensor, "b d"]:
        """A vector a sample."""
        if name == "text":
            return self.text(self.words(batch.token_ids), ANYWHERE).mean(1)
        return self.image(batch.media["image"]).values.unflatten(0, (len(batch.sample_ids), -1)).mean(1)

    def forward(self, batch: Batch) -> Float[Tensor, "b c"]:
        """Scores."""
        if len(self.reads) == 1:
            (name,) = self.reads
            return self.own[name](self.encode(name, batch))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.still):
            inputs = {str(name): vector(self.encode(name, batch)) for name in BOTH}
        if self.training and self.dropped:
            drop = ModalityDropout(dict.fromkeys(BOTH, self.dropped)).train()
            inputs = drop(inputs, torch.default_generator)
        return self.head(self.fusion(inputs).vector())

    def without(self, batch: Batch, *, lost: Modality) -> Float[Tensor, "b c"]:
        """Scores where one modality is absent."""
        kept = [name for name in BOTH if name != lost]
        inputs = only({str(name): vector(self.encode(name, batch)) for name in BOTH}, kept)
        return self.head(self.fusion(inputs).vector())


class Classify:
    """Cross-entropy of each target, as a sum."""

    needs_global_batch = False

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Targets."""
        return {"class": (batch.labels != IGNORE).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """In nats."""
        targets, scores = batch.labels[batch.labels != IGNORE], model(batch)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return {"class": nn.functional.cross_entropy(scores, targets, reduction="sum")}
