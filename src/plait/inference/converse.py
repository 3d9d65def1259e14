"""A conversation with a model: media checked as they come, turns kept, answers piece by piece.

The terminal and the server both ask through this, so that the same question gets the same answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from plait.core.types import Completion, MediaRef, Modality, Request, Text, Turn
from plait.data.media import CHANGES, LIMITS, open_image
from plait.data.sounds import SOUND_LIMITS, decode_sound
from plait.data.videos import VIDEO_LIMITS, open_video

if TYPE_CHECKING:
    from plait.inference.engine import Engine

DEFAULT_TOKENS = 256
"""Most tokens of an answer where nobody says how many; fewer where the context leaves fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How to answer.

    Attributes:
        max_new_tokens: Most tokens of the answer; None takes what the context leaves, at most :data:`DEFAULT_TOKENS`.
        temperature: 0 takes the likeliest token.
        seed: Of the sampling.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0


MAX_BYTES: Mapping[Modality, int] = {
    "image": LIMITS.max_bytes,
    "audio": SOUND_LIMITS.max_bytes,
    "video": VIDEO_LIMITS.max_bytes,
}
"""Largest file of each modality."""


class Attachments:
    """Bytes of the pictures, sounds and videos of a conversation, checked when they come in."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}

    def add(self, data: bytes, *, place: str) -> tuple[MediaRef, tuple[str, ...]]:
        """Take a picture, and say what decoding it changes (only the first frame of an animation, ...).

        Args:
            data: The encoded bytes.
            place: Where they come from, for errors.

        Raises:
            MediaError: It is refused: see :func:`plait.data.media.open_image`.
        """
        decoded = open_image(data, place=place)
        width, height = decoded.image.size
        ref = self._kept(data, MediaRef(modality="image", sha256="", uri=place, width=width, height=height))
        return ref, tuple(CHANGES[name] for name in decoded.changes)

    def add_sound(self, data: bytes, *, place: str) -> MediaRef:
        """Take a sound; whether it has the rate that the model hears is said when it is asked about.

        Raises:
            MediaError: It is refused: see :func:`plait.data.sounds.decode_sound`.
        """
        length = len(decode_sound(data, place=place).samples)
        return self._kept(data, MediaRef(modality="audio", sha256="", uri=place, length=length))

    def add_video(self, data: bytes, *, place: str) -> MediaRef:
        """Take a video.

        Raises:
            MediaError: It is refused: see :func:`plait.data.videos.open_video`.
            ConfigError: PyAV is not installed.
        """
        opened = open_video(data, place=place)
        size = {"width": opened.width, "height": opened.height}
        return self._kept(data, MediaRef(modality="video", sha256="", uri=place, length=opened.total, **size))

    def read(self, ref: MediaRef) -> bytes:
        """Bytes of what was added."""
        return self._data[ref.sha256]

    def _kept(self, data: bytes, ref: MediaRef) -> MediaRef:
        digest = hashlib.sha256(data).hexdigest()
        self._data[digest] = data
        return replace(ref, sha256=digest)


def build_request(engine: Engine, turns: Sequence[Turn], decoding: Decoding, *, name: str) -> Request:
    """A request whose answer fits behind its prompt.

    Args:
        engine: That will answer.
        turns: Up to the user's last one.
        decoding: How to answer.
        name: Of the request, for errors.

    Raises:
        DataError: The turns cannot be rendered.
    """
    wanted = decoding.max_new_tokens
    if wanted is None:
        room = engine.context - len(engine.render(turns).token_ids)
        wanted = max(1, min(DEFAULT_TOKENS, room))
    return Request(
        id=name, turns=tuple(turns), max_new_tokens=wanted, temperature=decoding.temperature, seed=decoding.seed
    )


def next_piece(pieces: Generator[str, None, Completion]) -> str | Completion:
    """The next piece of an answer, or in the end its completion."""
    try:
        return next(pieces)
    except StopIteration as end:
        return end.value


def user_turn(parts: Sequence[Text | MediaRef]) -> Turn:
    """A user's turn, with its pictures before its text where they came after all of it: as in training."""
    kinds = [isinstance(part, MediaRef) for part in parts]
    if kinds == sorted(kinds):
        parts = sorted(parts, key=lambda part: isinstance(part, Text))
    return Turn(role="user", parts=tuple(parts))


@dataclass(kw_only=True)
class Conversation:
    """Turns so far, and pictures that go with the next question.

    Attributes:
        engine: That answers; reads pictures by :meth:`Attachments.read`.
        decoding: How; each question of a conversation gets the next seed.
        turns: Questions and answers.
        pictures: For the next question; sounds and videos too.
        asked: Questions so far, of forgotten conversations too.
    """

    engine: Engine
    decoding: Decoding
    turns: list[Turn] = field(default_factory=list[Turn])
    pictures: list[MediaRef] = field(default_factory=list[MediaRef])
    asked: int = 0

    def ask(self, question: str) -> Generator[str, None, Completion]:
        """Answer piece by piece. What was said is kept, also of an answer that is stopped before its end.

        Raises:
            ContextError: The conversation with this question is too long; it stays as it was.
        """
        turn = user_turn([*self.pictures, Text(text=question)])
        decoding = Decoding(
            max_new_tokens=self.decoding.max_new_tokens,
            temperature=self.decoding.temperature,
            seed=self.decoding.seed + self.asked,
        )
        request = build_request(self.engine, [*self.turns, turn], decoding, name=f"{self.asked + 1}")
        return self._answer(turn, self.engine.stream(request))

    def forget(self) -> None:
        """Begin anew, with the pictures that were shown last, so that they need not be given again."""
        last = next((found for turn in reversed(self.turns) if (found := _pictures(turn))), [])
        self.pictures = self.pictures or last
        self.turns.clear()

    def _answer(self, turn: Turn, pieces: Generator[str, None, Completion]) -> Generator[str, None, Completion]:
        said: list[str] = []
        completion: Completion | None = None
        self.asked += 1
        try:
            while completion is None:
                piece = next_piece(pieces)
                if isinstance(piece, str):
                    said.append(piece)
                    yield piece
                else:
                    completion = piece
            return completion
        finally:
            pieces.close()
            if completion is not None or any(said):
                answer = Turn(role="assistant", parts=(Text(text="".join(said)),))
                self.turns += [turn, answer]
                self.pictures = []


def _pictures(turn: Turn) -> list[MediaRef]:
    return [part for part in turn.parts if isinstance(part, MediaRef)]
