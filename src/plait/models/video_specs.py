"""Encoders of videos as settings; beside :mod:`plait.models.specs`. Loads no torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from plait.models.specs import ImageEncoder, Part, Positive, PretrainedImage, Share, Square, ViT

Policy = Literal["uniform", "every"]
"""How frames are chosen: :class:`plait.data.frames.Sampling`."""


class PretrainedVideo(Part):
    """VideoMAE of Hugging Face from a folder, computed by our own tower; looks at as many frames as it has."""

    source: ClassVar[str] = "https://arxiv.org/abs/2203.12602"
    kind: Literal["pretrained"] = "pretrained"
    """Which encoder this is."""
    name: str = ""
    """A local folder in Hugging Face's layout."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the frozen weights."""


class FramesThenTime(Part):
    """any picture tower for each frame, then a Transformer or a mean over time."""

    source: ClassVar[str] = "https://arxiv.org/abs/2103.15691"
    kind: Literal["frames"] = "frames"
    """Which encoder this is."""
    tower: ImageEncoder = ViT()
    """Of the frames; `size` is theirs."""
    cells: Literal["pooled", "all"] = "pooled"
    """One token a frame, or all cells of each."""
    over_time: Literal["transformer", "mean", "none"] = "transformer"
    """What joins frames: blocks in which a cell looks at the same cell of all frames, their mean, or nothing."""
    position: Literal["learned", "sincos", "rope", "none"] = "sincos"
    """Code of a frame's number; without one the order of frames cannot be told."""
    frames: Positive = 16
    """Frames that are looked at; learned positions are made for so many."""
    sampling: Policy = "uniform"
    """Which: as many over the whole video, or every `step`-th from the first on, `frames` at most."""
    step: Positive = 1
    """Of `every`: from one frame to the next."""
    depth: Positive = 4
    """Blocks over time."""
    heads: Positive = 6
    """Their heads of attention."""
    dropout: Share = 0.0
    """Share of what each part adds that is dropped while training."""

    @model_validator(mode="after")
    def _squares(self) -> "FramesThenTime":
        if isinstance(self.tower, PretrainedImage) and not isinstance(self.tower.fit, Square):
            raise ValueError(f"tower.fit is {self.tower.fit.kind}: frames are fitted into squares; leave it out")
        return self


class SpaceTime(Part):
    """one Transformer over space-time patches, as VideoMAE's and ViViT's joint form; the defaults are VideoMAE-S."""

    source: ClassVar[str] = "https://arxiv.org/abs/2203.12602"
    kind: Literal["space-time"] = "space-time"
    """Which encoder this is."""
    size: Positive = 224
    """Pixels a side that frames are fitted into; learned positions are made for it."""
    frames: Positive = 16
    """Frames that are looked at; learned positions are made for so many."""
    sampling: Policy = "uniform"
    """Which: as many over the whole video, or every `step`-th from the first on, `frames` at most."""
    step: Positive = 1
    """Of `every`: from one frame to the next."""
    tubelet: Positive = 2
    """Frames of a patch."""
    patch: Positive = 16
    """Pixels a side of a patch."""
    d: Positive = 384
    """Width."""
    depth: Positive = 12
    """Blocks."""
    heads: Positive = 6
    """Heads of attention."""
    position: Literal["sincos", "learned", "sequence", "none"] = "sincos"
    """Sines and cosines of time, row and column; a learned table; VideoMAE's of the patch's number; nothing."""
    dropout: Share = 0.0
    """Share of what each part adds that is dropped while training."""
    drop_path: Share = 0.0
    """Share of clips for which the last block is skipped while training; earlier ones less."""

    @model_validator(mode="after")
    def _one_grid(self) -> "SpaceTime":
        # A learned table would be stretched: a short video's second frame would get the code of a later one.
        if self.position in ("sequence", "learned") and self.sampling != "uniform":
            raise ValueError(
                f"position is {self.position}, made for {self.frames} frames; sampling {self.sampling} gives short "
                "videos fewer: choose uniform, or another position"
            )
        return self


ScratchVideo = Annotated[FramesThenTime | SpaceTime, Field(discriminator="kind")]
"""Encoders of videos from scratch; the picture tower in one of them may be pretrained."""

VideoEncoder = Annotated[PretrainedVideo | FramesThenTime | SpaceTime, Field(discriminator="kind")]
"""All encoders of videos."""
