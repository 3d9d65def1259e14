"""Core types: what flows between packages.

Letters: ``b`` rows, ``t`` text positions, ``n`` ragged media tokens, ``d`` width, ``v`` vocabulary,
``item`` media items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Modality = Literal["image", "audio", "video", "text"]
"""What a media item is; ``text`` is used for cached features of a frozen text tower."""
Role = Literal["system", "user", "assistant", "tool"]
AnswerKind = Literal["reference", "chosen", "rejected", "label"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A piece of text inside a turn."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRef:
    """A pointer to media bytes; the bytes are read where they are needed.

    Attributes:
        sha256: Hex digest of the encoded bytes; the key of every cache.
        uri: A path, or ``shard.tar#member`` relative to the shard folder.
        width: Pixels (0 for audio).
        height: Pixels (0 for audio).
        length: Samples of a sound, frames of a video (0 for pictures): with it their tokens can be counted before they
            are opened.
    """

    modality: Modality
    sha256: str
    uri: str
    width: int = 0
    height: int = 0
    length: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message. ``trained`` says whether a loss is taken on it."""

    role: Role
    parts: tuple[Text | MediaRef, ...]
    trained: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A reference, a chosen or rejected reply, or a class label. ``name`` says which question it answers."""

    kind: AnswerKind
    text: str
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One raw example, modality-neutral and cheap to copy.

    Attributes:
        id: Stable: a hash of source and content (see :func:`plait.data.sources.sample_id`).
        turns: The conversation; a bare captioned picture has one user turn holding it.
        answers: References, preferences, labels.
        meta: Source, licence, language, concept: for people, filters and splits; never read by training.
    """

    id: str
    turns: tuple[Turn, ...]
    answers: tuple[Answer, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def media(self) -> tuple[MediaRef, ...]:
        """Every media reference, in reading order."""
        return tuple(p for turn in self.turns for p in turn.parts if isinstance(p, MediaRef))

    def text(self, role: Role) -> str:
        """All text of one role, joined by newlines."""
        return "\n".join(p.text for t in self.turns if t.role == role for p in t.parts if isinstance(p, Text))

    def answer(self, name: str) -> str | None:
        """The first answer with that name, or None."""
        return next((a.text for a in self.answers if a.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data, the inverse of :meth:`from_json`."""
        return {
            "id": self.id,
            "turns": [_turn_to_json(t) for t in self.turns],
            "answers": [{"kind": a.kind, "text": a.text, "name": a.name} for a in self.answers],
            "meta": dict(self.meta),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Sample:
        """Build a sample from :meth:`to_json` output.

        Raises:
            KeyError: A field is missing.
            TypeError: A field has the wrong name.
        """
        return cls(
            id=record["id"],
            turns=tuple(_turn_from_json(t) for t in record["turns"]),
            answers=tuple(Answer(**a) for a in record["answers"]),
            meta=dict(record["meta"]),
        )


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    parts = [{"text": p.text} if isinstance(p, Text) else _media_to_json(p) for p in turn.parts]
    return {"role": turn.role, "parts": parts, "trained": turn.trained}


def _media_to_json(ref: MediaRef) -> dict[str, Any]:
    record = {"modality": ref.modality, "sha256": ref.sha256, "uri": ref.uri, "width": ref.width, "height": ref.height}
    return record | ({"length": ref.length} if ref.length else {})


def _turn_from_json(record: Mapping[str, Any]) -> Turn:
    parts = tuple(Text(**p) if "text" in p else MediaRef(**p) for p in record["parts"])
    return Turn(role=record["role"], parts=parts, trained=record["trained"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A measured number with its 95 % interval and the rule that made it.

    Attributes:
        name: Metric name, such as ``retrieval/R@1``.
        value: Point estimate.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        n: Items scored.
        rule: Identifier of the exact definition.
        failures: Answers that could not be parsed; counted, never guessed.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    rule: str
    failures: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a model is asked: turns, and how to decode."""

    id: str
    turns: tuple[Turn, ...]
    max_new_tokens: int = 32
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a model answered."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish: Literal["stop", "length", "cancelled", "error"]
    prompt_tokens: int = 0
    image_tokens: int = 0
