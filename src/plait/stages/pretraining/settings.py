"""Settings inside those of the pretrain stage. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from plait.core.spec import Derived, Spec
from plait.data.augment.settings import Changes
from plait.objectives.specs import MoCo, OverViews
from plait.stages.voices import Voices

if TYPE_CHECKING:
    from plait.stages.pretrain import Pretrain

WHISPER = "whisper-tiny-en"
"""The packaged audio tower."""


class SpokenNames(Voices):
    """Names said aloud: sounds as a third modality of the space. Needs the extra `speech` (espeak-ng)."""

    audio_tower: str = WHISPER
    """Frozen tower that hears: `whisper-tiny-en`, or a local Hugging Face folder of an audio family."""
    window_s: float = Field(default=0.0, ge=0.0, le=30.0)
    """Of Whisper: seconds it hears at once; 4 of `whisper-tiny-en`, unless said otherwise. 0 is the 30 of its training;
    less takes less time, and gives other features."""
    takes: int = Field(default=3, ge=1)
    """In how many ways, each with its voice and speed, a name of training is said."""
    max_seconds: float = Field(default=4.0, gt=0.0, le=30.0)
    """What takes longer to say is left out, and counted."""

    @classmethod
    def derive(cls, given: Mapping[str, Any]) -> Mapping[tuple[str, ...], Derived]:
        """Names are short: the packaged Whisper need not hear 30 s of silence behind each."""
        packaged = given.get("audio_tower", WHISPER) == WHISPER
        return {("window_s",): Derived(4.0, "audio_tower")} if packaged else {}

    @model_validator(mode="after")
    def _fits(self) -> SpokenNames:
        ways = len({*self.voices}) * len({*self.speeds})
        if self.takes > ways:
            raise ValueError(
                f"takes is {self.takes}: {len({*self.voices})} voices at {len({*self.speeds})} speeds are "
                f"{ways}; give fewer takes, or more voices or speeds"
            )
        if self.window_s and self.max_seconds > self.window_s:
            raise ValueError(
                f"max_seconds is {self.max_seconds:g}, but window_s only {self.window_s:g}: "
                "raise window_s or lower max_seconds"
            )
        return self


class Views(Spec):
    """Views of each picture, for objectives that compare them; and the head between the tower and the loss."""

    number: int = Field(default=2, ge=2, le=16)
    """Views of each picture in a step; `nt-xent`, `n-pair`, `hard-nt-xent` and `moco` take two."""
    layers: Literal[2, 3] = 2
    """Linear layers of the head, with `d_hidden` between them and `d_shared` behind. What the tower is used for later
    is in front of it."""
    changes: Changes = Changes()
    """How a view comes about."""


_OF_PAIRS = ("spoken", "text_tower", "max_tokens", "tower_dtype", "keywords", "scale")
"""Settings of the form with texts, which views have no use for."""


def check_form(spec: Pretrain) -> None:
    """See that the objective, and what else is set, belong to one form of the stage.

    Raises:
        ValueError: They do not.
    """
    objective, views = spec.objective, spec.views
    if not isinstance(objective, OverViews):
        if views is not None:
            raise ValueError(
                f"views is set, and objective is {objective.kind}, which compares pictures with texts: take views out, "
                "or choose an objective over views (`plait list objectives`)"
            )
        return
    if views is None:
        raise ValueError(f"objective is {objective.kind}, which compares views, and views is null: take the null out")
    if isinstance(spec.image_tower, str):
        raise ValueError(
            f"objective is {objective.kind}, which compares views of pictures and trains their tower; image_tower is "
            f"{spec.image_tower!r}, which is frozen: give it a tower from scratch, such as {{kind: vit, size: 64}}"
        )
    fields = type(spec).model_fields
    if given := [name for name in _OF_PAIRS if getattr(spec, name) != fields[name].default]:
        raise ValueError(
            f"{', '.join(given)}: settings of a dual encoder, here views of pictures are compared, without texts "
            "(their temperature is the objective's own); take them out (set them to null where a parent recipe gives "
            "them)"
        )
    if objective.two and views.number != 2:
        raise ValueError(
            f"views.number is {views.number}, and {objective.kind} takes two views of each picture: set 2, or choose "
            "supcon, margin or triplet"
        )
    if isinstance(objective, MoCo) and spec.trainer.parallel.zero:
        raise ValueError(
            f"trainer.parallel.zero is {spec.trainer.parallel.zero}, and moco keeps a whole copy of the weights in "
            "every process, which follows them: set zero to 0"
        )
