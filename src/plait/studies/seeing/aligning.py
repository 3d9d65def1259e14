"""A tower of pictures and a Transformer of texts that learn one space: are two Transformers easier to align?"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.evaluation.space import linear_cka
from plait.models.dual import limited
from plait.models.towers.text_transformer import TextSizes, TextTransformer
from plait.models.transformer import TransformerSizes
from plait.objectives.contrastive import info_nce
from plait.studies.encoders import EncoderName
from plait.studies.seeing.scenes import CELL, COLORS, SHAPES, SIDE, SKIP, Scenes, draw_scenes
from plait.studies.seeing.students import Student
from plait.studies.seeing.training import Training
from plait.training.optim import AdamW, Rates
from plait.training.schedule import Cosine

_COLUMNS = SIDE // CELL
WORDS = 1 + COLORS * SHAPES + COLORS * _COLUMNS
"""No word, a color with a shape, a color with a column."""


def texts_of(scenes: Scenes) -> Int[Tensor, "b word"]:
    """Two words for each color that is there: with its shape, and with its column; 0 for one that is not.

    Example:
        >>> texts_of(draw_scenes(3, torch.Generator().manual_seed(0))).shape
        torch.Size([3, 10])
    """
    color, shape = torch.arange(COLORS), scenes.targets["shape"]
    there = shape != SKIP
    shapes = 1 + color * SHAPES + shape
    columns = 1 + COLORS * SHAPES + color * _COLUMNS + scenes.columns
    return torch.cat([torch.where(there, words, 0) for words in (shapes, columns)], dim=1)


class Pair(nn.Module):
    """Pictures and texts to unit vectors.

    Args:
        name: Of the tower of pictures.
        d: Width.
    """

    def __init__(self, name: EncoderName, *, d: int = 32) -> None:
        super().__init__()
        self.student = Student(name, places=False)
        sizes = TextSizes(
            transformer=TransformerSizes(d=d, depth=2, heads=4), vocabulary=WORDS, position="none", pool="mean"
        )
        self.words = TextTransformer(sizes)
        nn.init.normal_(self.words.embedding.weight, std=0.5)
        self.picture, self.text = nn.Linear(d, d), nn.Linear(d, d)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(
        self, pixels: Float[Tensor, "b 3 h w"], words: Int[Tensor, "b word"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Vectors of both."""
        picture = self.picture(self.student.cells(pixels).mean(1))
        text = self.text(self.words.pooled(words, segment_ids=(words > 0).long()))
        return functional.normalize(picture, dim=1), functional.normalize(text, dim=1)


def align(pair: Pair, training: Training, *, generator: torch.Generator) -> float:
    """Train on new pairs; returns the mean loss of the last tenth of the steps."""
    weights = {
        name: weight
        for name, weight in pair.named_parameters()
        if name.startswith(("student.tower", "student.neck", "student.norm", "words", "picture", "text", "log_scale"))
    }
    optimizer = AdamW(weight_decay=0.05).build(weights, rates=Rates(lr=training.lr))
    schedule = Cosine(warmup=0.05)
    pair.train()
    losses: list[Tensor] = []
    for step in range(training.steps):
        batch = draw_scenes(training.batch, generator)
        picture, text = pair(batch.pixels, texts_of(batch))
        loss = info_nce(picture, text, limited(pair.log_scale)) / training.batch
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule.factor(step, training.steps)
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, training.steps // 10) :]).mean())


@torch.inference_mode()
def aligned(pair: Pair, scenes: Scenes) -> dict[str, float]:
    """``r@1``: share of pictures whose own text is nearest, and of texts, mean of both; ``cka`` of the two.

    Pictures with the same text count as right for each other.
    """
    words = texts_of(scenes)
    picture, text = pair.eval()(scenes.pixels, words)
    same = (words[:, None] == words[None]).all(-1)
    scores = picture @ text.mT
    right = [same[torch.arange(len(same)), scores.argmax(at)] for at in (1, 0)]
    return {
        "r@1": float(torch.cat(right).double().mean()),
        "cka": linear_cka(picture.double().numpy(), text.double().numpy()),
    }
