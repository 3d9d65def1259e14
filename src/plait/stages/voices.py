"""Who says texts aloud, wherever a stage has them said."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field, model_validator

from plait.core.spec import Spec

Voice: TypeAlias = Annotated[str, Field(pattern=r"^en(-[A-Za-z0-9]+)*(\+[A-Za-z0-9]+)?$")]
"""An English language of espeak-ng, alone or with a variant."""


class Voices(Spec):
    """Voices and speeds; other voices are tested than are trained on."""

    voices: Annotated[tuple[Voice, ...], Field(min_length=1)] = ("en-us", "en-us+m6", "en-us+m8", "en-us+f2", "en")
    """Voices of training: an English language of espeak-ng, alone or with a variant."""
    test_voices: Annotated[tuple[Voice, ...], Field(min_length=1)] = ("en-us+m5", "en-us+f3")
    """Voices of the test splits; none of them may be one of training."""
    speeds: Annotated[tuple[Annotated[int, Field(ge=80, le=450)], ...], Field(min_length=1)] = (140, 160, 180)
    """Words a minute."""

    @model_validator(mode="after")
    def _held_out(self) -> Voices:
        both = sorted({*self.voices} & {*self.test_voices})
        if both:
            raise ValueError(f"voices that are tested must not be trained on: {', '.join(both)}")
        return self
