"""Which contrastive objective a pretrain stage minimizes, as settings; and where each other objective is set. No torch.

Every class is one entry of ``plait list objectives``: its first line says what it is, ``source`` where it comes from.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, NamedTuple, get_args

from pydantic import Field

from plait.core.spec import Spec

Temperature = Annotated[float, Field(ge=1e-6)]
"""What cosines are divided by."""


class Part(Spec):
    """Base of all objectives that a recipe chooses from."""

    source: ClassVar[str] = ""
    """Paper."""
    where: ClassVar[str] = "stages.pretrain.objective"
    """Setting that chooses it."""
    over: ClassVar[Literal["pairs", "views"]] = "pairs"
    """What it compares: pictures with texts, or views of pictures with each other."""


# --- pairs of a picture and a text -----------------------------------------------------------------------------------


class Contrastive(Part):
    """picture and text find each other in the batch: symmetric InfoNCE (CLIP); those of one concept match."""

    source: ClassVar[str] = "https://arxiv.org/abs/2103.00020"
    kind: Literal["contrastive"] = "contrastive"
    """Which objective this is."""


class Sigmoid(Part):
    """every picture and text is judged for itself: do they belong together (SigLIP); the bias is learned."""

    source: ClassVar[str] = "https://arxiv.org/abs/2303.15343"
    kind: Literal["sigmoid"] = "sigmoid"
    """Which objective this is."""
    bias: float | None = Field(default=None, ge=-100.0, le=100.0)
    """Added to every score at the start. null is log(1 / (b - 1)) of the batch of b pairs that there is: one of b texts
    belongs to a picture. The paper's -10 is about that of its 32,768 pairs."""

    def bias_for(self, batch: int) -> float:
        """Where the bias starts.

        Args:
            batch: Pairs of a step, of all processes together.

        Example:
            >>> round(Sigmoid().bias_for(32_768), 1), Sigmoid().bias_for(2), Sigmoid(bias=-10).bias_for(2)
            (-10.4, 0.0, -10.0)
        """
        return self.bias if self.bias is not None else math.log(1 / (batch - 1))


class HardContrastive(Part):
    """as `contrastive`, where a negative weighs the more, the nearer it is; pairs of one concept are no negatives."""

    source: ClassVar[str] = "https://arxiv.org/abs/2010.04592"
    kind: Literal["hard-contrastive"] = "hard-contrastive"
    """Which objective this is."""
    hardness: float = Field(default=1.0, ge=0.0)
    """Negatives weigh by exp(hardness x score); 0: all alike. The paper's are 0.5 to 2."""
    prior: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of pairs taken to be of the same kind, which is taken off; the paper's tau+. Concepts are known here, and
    are never negatives of themselves: 0 says that there is nothing else to take off."""


# --- views of a picture ----------------------------------------------------------------------------------------------


class OverViews(Part):
    """Base of those that compare views."""

    over: ClassVar[Literal["pairs", "views"]] = "views"
    two: ClassVar[bool] = True
    """Whether it takes two views of each picture, no more."""

    @property
    def knows_classes(self) -> bool:
        """Whether pictures of one concept are told as such."""
        return bool(getattr(self, "classes", False))


class NTXent(OverViews):
    """a view finds the other view of its picture among all views of the batch (SimCLR); concepts are not looked at."""

    source: ClassVar[str] = "https://arxiv.org/abs/2002.05709"
    kind: Literal["nt-xent"] = "nt-xent"
    """Which objective this is."""
    temperature: Temperature = 0.5
    """What cosines are divided by; the paper's best is 0.1 to 0.5, by batch size and length of training."""


class SupCon(OverViews):
    """a view finds all views of pictures of its concept; without concepts it would be `nt-xent`."""

    source: ClassVar[str] = "https://arxiv.org/abs/2004.11362"
    two: ClassVar[bool] = False
    kind: Literal["supcon"] = "supcon"
    """Which objective this is."""
    temperature: Temperature = 0.1
    """What cosines are divided by."""

    @property
    def knows_classes(self) -> bool:
        """Always."""
        return True


class NPair(OverViews):
    """the second view of a picture against those of all others, by inner products (N-pair)."""

    source: ClassVar[str] = (
        "https://papers.nips.cc/paper/6200-improved-deep-metric-learning-with-multi-class-n-pair-loss-objective"
    )
    kind: Literal["n-pair"] = "n-pair"
    """Which objective this is."""
    shrink: float = Field(default=0.002, ge=0.0)
    """Factor of the squared lengths of vectors, which are held back so; 0 takes the term away."""
    classes: bool = True
    """Pictures of one concept are no negatives of each other; otherwise each picture is a kind of its own."""


class Margin(OverViews):
    """what belongs together is drawn together, all else pushed apart up to a margin (Hadsell)."""

    source: ClassVar[str] = "https://doi.org/10.1109/CVPR.2006.100"
    two: ClassVar[bool] = False
    kind: Literal["margin"] = "margin"
    """Which objective this is."""
    margin: float = Field(default=1.0, gt=0.0)
    """Distance beyond which others are left alone."""
    average: Literal["kind", "pairs"] = "kind"
    """Means over the pairs of each kind, or over all pairs, as in the paper."""
    unit: bool = True
    """Set vectors to length 1, so that no distance is above 2."""
    classes: bool = True
    """Pictures of one concept belong together; otherwise only the views of a picture do."""


class Triplet(OverViews):
    """nearer to what belongs together than to all else by a margin, over triplets of the batch (FaceNet)."""

    source: ClassVar[str] = "https://arxiv.org/abs/1503.03832"
    two: ClassVar[bool] = False
    kind: Literal["triplet"] = "triplet"
    """Which objective this is."""
    margin: float = Field(default=0.2, gt=0.0)
    """How much nearer."""
    mining: Literal["all", "semi-hard", "hard"] = "semi-hard"
    """Which triplets are taken: all; for each positive the nearest negative beyond it; or the farthest positive with
    the nearest negative, which may draw all into one point."""
    average: Literal["all", "active"] = "all"
    """Mean over the triplets taken, or over those that are not yet 0."""
    squared: bool = True
    """Squared distances, as in FaceNet."""
    unit: bool = True
    """Set vectors to length 1."""
    classes: bool = True
    """Pictures of one concept belong together; otherwise only the views of a picture do."""


class HardNTXent(OverViews):
    """as `nt-xent`, where a negative weighs the more, the nearer it is."""

    source: ClassVar[str] = "https://arxiv.org/abs/2010.04592"
    kind: Literal["hard-nt-xent"] = "hard-nt-xent"
    """Which objective this is."""
    hardness: float = Field(default=1.0, ge=0.0)
    """Negatives weigh by exp(hardness x score); 0: all alike."""
    prior: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of pictures taken to be of the same kind, which is taken off; for `classes: false`."""
    temperature: Temperature = 0.5
    """What cosines are divided by."""
    classes: bool = True
    """Pictures of one concept are no negatives of each other; otherwise all pictures but itself are."""


class MoCo(OverViews):
    """a view finds the other one among keys of earlier batches, made by a slowly moving copy of the model (MoCo)."""

    source: ClassVar[str] = "https://arxiv.org/abs/1911.05722"
    kind: Literal["moco"] = "moco"
    """Which objective this is."""
    queue: int = Field(default=512, ge=1)
    """Keys that are kept. Keep it below the number of training pictures, unless `classes` is true: an older key of the
    same picture would be a negative."""
    momentum: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Share of the copy that stays in a step. The paper's 0.999 is for hundreds of thousands of steps."""
    temperature: Temperature = 0.07
    """What cosines are divided by."""
    classes: bool = False
    """Keys of the same concept are no negatives; by default concepts are not looked at, as in the paper."""


Views = NTXent | SupCon | NPair | Margin | Triplet | HardNTXent | MoCo
"""Those that compare views."""

Objective = Annotated[
    Contrastive | Sigmoid | HardContrastive | NTXent | SupCon | NPair | Margin | Triplet | HardNTXent | MoCo,
    Field(discriminator="kind"),
]
"""What a pretrain stage may minimize."""

OVER_VIEWS = frozenset(str(kind.model_fields["kind"].default) for kind in get_args(Views))
"""Kinds that compare views."""


# --- what is chosen elsewhere ----------------------------------------------------------------------------------------


class Elsewhere(NamedTuple):
    """An objective that is no choice of ``stages.pretrain.objective``."""

    about: str
    source: str
    made_by: str
    where: str


_HERE = "plait.objectives."
ELSEWHERE: dict[str, Elsewhere] = {
    "query-tasks": Elsewhere(
        "a Q-Former compares, judges and writes: BLIP-2's terms contrast, match and generate, added up",
        "https://arxiv.org/abs/2301.12597",
        _HERE + "matching.QueryTasks",
        "stages.pretrain.qformer",
    ),
    "next-token": Elsewhere(
        "the next token of an answer, from all before it and the media",
        "https://arxiv.org/abs/2304.08485",
        _HERE + "language.NextToken",
        "stages.tune: always",
    ),
    "word-targets": Elsewhere(
        "a connector hits the words of a picture's name, without a pass of the decoder",
        "https://arxiv.org/abs/1512.00567",
        _HERE + "words.WordTargets",
        "stages.tune.words, with the connector `words`",
    ),
    "dpo": Elsewhere(
        "the right answer becomes likelier than a wrong one, measured from where the model began",
        "https://arxiv.org/abs/2305.18290",
        _HERE + "preference.DirectPreference",
        "stages.align: always",
    ),
    "aligned": Elsewhere(
        "labels of one domain, and the features of two drawn together by CORAL or MMD",
        "https://arxiv.org/abs/1607.01719",
        _HERE + "domain.Aligned",
        "Python, and `plait study domain-shift`",
    ),
    "adversarial": Elsewhere(
        "labels of one domain, and features whose domain cannot be told (DANN)",
        "https://arxiv.org/abs/1505.07818",
        _HERE + "domain.Adversarial",
        "Python, and `plait study domain-shift`",
    ),
    "masked-tokens": Elsewhere(
        "hidden tokens of a text, found from both sides (BERT)",
        "https://arxiv.org/abs/1810.04805",
        _HERE + "masked.MaskedTokens",
        "Python",
    ),
    "masked-pixels": Elsewhere(
        "pixels of hidden cells, which the tower did not see (MAE)",
        "https://arxiv.org/abs/2111.06377",
        _HERE + "masked.MaskedPixels",
        "Python",
    ),
    "classified": Elsewhere(
        "the class of each row, with label smoothing or a loss that bears wrong labels",
        "https://arxiv.org/abs/1805.07836",
        _HERE + "classes.Classified",
        "Python",
    ),
    "answered": Elsewhere(
        "VQA as classification: each answer judged by itself, after how many people gave it",
        "https://arxiv.org/abs/1708.02711",
        _HERE + "classes.Answered",
        "Python",
    ),
    "pseudo-labelled": Elsewhere(
        "what the model is sure of becomes a label (pseudo-labels, FixMatch)",
        "https://arxiv.org/abs/2001.07685",
        _HERE + "classes.PseudoLabelled",
        "Python",
    ),
    "masked-speech": Elsewhere(
        "which of several quantized frames stood where a sound was masked (wav2vec 2.0)",
        "https://arxiv.org/abs/2006.11477",
        _HERE + "speech.MaskedSpeech",
        "Python",
    ),
    "recoding": Elsewhere(
        "a picture through a bottleneck of codes, beside itself (VQ-VAE)",
        "https://arxiv.org/abs/1711.00937",
        _HERE + "reconstruction.Recoding",
        "Python",
    ),
    "naive": Elsewhere(
        "distances of what matches minus those of all else: has no minimum, there to be seen falling without end",
        "https://doi.org/10.1109/CVPR.2006.100",
        _HERE + "margins.NaiveContrastive",
        "Python, for teaching",
    ),
}
"""Objectives by name."""
