"""Turns to token ids as a vision-language model's own processor writes them, id for id, pictures expanded from sizes.

The whole conversation is tokenized at once, as the processor does it, so that words join across the template's edges
as they did in training. What a person types still never becomes a control token: where a text holds one, that piece
alone is tokenized as plain words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from plait.core.errors import ConfigError, DataError
from plait.core.types import MediaRef, Sample, Text, Turn
from plait.data.template import Rendered, check_trainable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = re.compile("\ue000(\\d+)\ue001")
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of the rendered text: the template's own, a part's words, or a picture."""

    kind: Literal["frame", "words", "picture"]
    text: str
    part: int = -1


class ProcessorTemplate:
    """Renders turns as a processor's ``apply_chat_template(..., tokenize=True)`` does.

    Args:
        tokenizer: A fast one.
        compose: Messages (contents are lists of ``{"type": ...}``) to text, with one ``mark`` for each picture; told
            whether the assistant's next turn is opened.
        expand: The token account: the pictures of one conversation to the texts that their marks become, from their
            sizes alone.
        mark: How ``compose`` writes a picture.
        placeholder: Id that stands for one token of a picture.
        stops: Ids that may end an answer.
        adds: Whether the tokenizer adds its own first token where the text has none.

    Raises:
        ConfigError: The tokenizer cannot say where its ids come from.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        compose: Callable[[Sequence[Message], bool], str],
        expand: Callable[[Sequence[MediaRef]], Sequence[str]],
        mark: str,
        placeholder: int,
        stops: Sequence[int],
        adds: bool = True,
    ) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} does not say from which characters an id comes",
                place=str(tokenizer.name_or_path),
                remedy="convert the tokenizer to tokenizer.json (transformers does so when it saves a fast one)",
            )
        self.tokenizer = tokenizer
        self.compose = compose
        self.expand = expand
        self.mark = mark
        self.placeholder = placeholder
        self.stops = frozenset(stops)
        self.adds = adds

    def sample(self, sample: Sample) -> Rendered:
        """Render a whole training sample.

        Raises:
            DataError: Nothing in it is trained, or a turn cannot be rendered; names the sample.
        """
        place = f"sample {sample.id}"
        return self.turns(sample.turns, place=place).expect_trained(place)

    def turns(self, turns: Sequence[Turn], *, prompt: bool = False, place: str = "the request") -> Rendered:
        """Render turns; with ``prompt`` the template opens the assistant's next turn.

        Raises:
            DataError: There is no turn, a trained turn holds a picture or nothing, the template refuses the roles,
                drops or changes what is said, or a text holds a reserved character.
            ConfigError: The template does not end a trained turn with a token that ends answers: a model trained on
                that would never learn to stop.
        """
        if not turns:
            raise DataError("there is no turn", place=place, remedy="give at least one user turn")
        for turn in turns:
            check_trainable(turn, place)
        pieces = self._pieces(turns, prompt=prompt, place=place)
        ids, spans = self._encode(pieces)
        starts = _starts(pieces)
        media = tuple(part for turn in turns for part in turn.parts if isinstance(part, MediaRef))
        slots: list[int] = []
        for piece, start in zip(pieces, starts, strict=False):
            if piece.kind == "picture":
                end = start + len(piece.text)
                slots.append(
                    sum(i == self.placeholder and start <= s[0] < end for i, s in zip(ids, spans, strict=True))
                )
        if sum(slots) != ids.count(self.placeholder):
            raise DataError(
                f"{ids.count(self.placeholder)} placeholders, {sum(slots)} of them of pictures",
                place=place,
                remedy=f"the chat template writes {self.mark!r} where there is no picture: use the model's own",
            )
        trained = self._trained(turns, pieces, ids, spans=spans)
        return Rendered(token_ids=tuple(ids), trained=tuple(trained), media=media, slots=tuple(slots))

    @property
    def stop(self) -> int:
        """The id that the template writes after an answer; the tokenizer's own end where it writes none."""
        turns = [_said("user", "a"), _said("assistant", "b")]
        pieces = self._pieces(turns, prompt=False, place="the chat template")
        ids, spans = self._encode(pieces)
        last = max(index for index, piece in enumerate(pieces) if piece.kind == "words")
        behind = _starts(pieces)[last] + len(pieces[last].text)
        found = [i for i, span in zip(ids, spans, strict=True) if span[0] >= behind and i in self.stops]
        end = self.tokenizer.eos_token_id
        assert isinstance(end, int)
        return found[0] if found else end

    # --- inside ----------------------------------------------------------------------------------------------------

    def _pieces(self, turns: Sequence[Turn], *, prompt: bool, place: str) -> list[_Piece]:
        parts = [part for turn in turns for part in turn.parts]
        words = {number: part.text for number, part in enumerate(parts) if isinstance(part, Text)}
        for text in words.values():
            if _MARK.search(text):
                raise DataError("the text holds U+E000, which is reserved", place=place, remedy="remove that character")
        marked = self._composed(turns, {n: f"\ue000{n}\ue001" for n in words}, prompt=prompt, place=place)
        found = _MARK.split(marked)
        seen = sorted(int(number) for number in found[1::2])
        pictures = sum(frame.count(self.mark) for frame in found[::2])
        if seen != sorted(words) or pictures != len(parts) - len(words):
            raise DataError(
                f"the chat template writes {len(seen)} of {len(words)} texts and {pictures} of "
                f"{len(parts) - len(words)} pictures",
                place=place,
                remedy="use a chat template that writes every part once",
            )
        real = self._composed(turns, words, prompt=prompt, place=place)
        for change in (str, str.strip):  # templates such as Gemma's trim what is said
            said = {number: change(text) for number, text in words.items()}
            if real == _MARK.sub(lambda at, said=said: said[int(at[1])], marked):
                return self._cut(found, said, [part for part in parts if isinstance(part, MediaRef)])
        raise DataError(
            "the chat template changes what is said",
            place=place,
            remedy="use a chat template that writes each text as it is, or without the space around it",
        )

    def _composed(self, turns: Sequence[Turn], words: Mapping[int, str], *, prompt: bool, place: str) -> str:
        from jinja2 import TemplateError

        number = iter(range(sum(len(turn.parts) for turn in turns)))
        messages: list[Message] = []
        for turn in turns:
            content: list[dict[str, str]] = []
            for part in turn.parts:
                index = next(number)
                content.append(
                    {"type": "image"} if isinstance(part, MediaRef) else {"type": "text", "text": words[index]}
                )
            messages.append({"role": turn.role, "content": content})
        try:
            return self.compose(messages, prompt)
        except TemplateError as error:
            roles = ", ".join(turn.role for turn in turns)
            raise DataError(
                f"the chat template refuses the roles {roles}: {error}",
                place=place,
                remedy="let user and assistant alternate, or use another chat template",
            ) from error

    def _cut(self, found: Sequence[str], said: Mapping[int, str], media: Sequence[MediaRef]) -> list[_Piece]:
        """The rendered text, cut where the template ends and words or a picture begin."""
        expanded = iter(self.expand(media) if media else ())
        pieces: list[_Piece] = []
        for index, piece in enumerate(found):
            if index % 2:
                pieces.append(_Piece("words", said[int(piece)], int(piece)))
                continue
            for nth, frame in enumerate(piece.split(self.mark)):
                if nth:
                    pieces.append(_Piece("picture", next(expanded)))
                pieces.append(_Piece("frame", frame))
        return pieces

    def _encode(self, pieces: Sequence[_Piece]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters of the whole text that each comes from."""
        text = "".join(piece.text for piece in pieces)
        bos = self.tokenizer.bos_token
        special = self.adds and not (isinstance(bos, str) and text.startswith(bos))
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for start, end in [*self._typed_controls(pieces, text), (len(text), len(text))]:
            for first, last, plain in ((at, start, False), (start, end, True)):
                if first < last or (special and not at and not plain):
                    found = self._ids(text[first:last], plain=plain, special=special and not at, inside=first > 0)
                    ids += [i for i, _ in found]
                    spans += [(first + a, first + b) for _, (a, b) in found]
            at = end
        return ids, spans

    def _typed_controls(self, pieces: Sequence[_Piece], text: str) -> list[tuple[int, int]]:
        """Where the words of a person make up, or help to make up, a control token."""
        frames = "\0".join(piece.text for piece in pieces if piece.kind != "words")
        added: Mapping[int, Any] = self.tokenizer.added_tokens_decoder
        names = [t.content for t in added.values() if t.special or (t.content in frames and not t.content.isspace())]
        if not names:
            return []
        spans: list[tuple[int, int]] = []
        at = 0
        for piece in pieces:
            if piece.kind == "words":
                spans.append((at, at + len(piece.text)))
            at += len(piece.text)
        controls = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        return [m.span() for m in controls.finditer(text) if any(m.start() < b and m.end() > a for a, b in spans)]

    def _ids(self, text: str, *, plain: bool, special: bool, inside: bool) -> list[tuple[int, tuple[int, int]]]:
        """Ids of a stretch with their characters.

        Args:
            text: The stretch.
            plain: Control tokens in it are words.
            special: The tokenizer adds its first token.
            inside: Something stands before it, so it gets no space of its own: it is tokenized behind a newline.
        """
        front = "\n" if inside else ""
        found = self._call(front + text, plain=plain, special=special)
        if inside:
            newline = self._call("\n", plain=False, special=False)
            ids = [i for i, _ in newline]
            if [i for i, _ in found[: len(ids)]] == ids:
                found = [(i, (a - 1, b - 1)) for i, (a, b) in found[len(ids) :]]
            else:
                found = self._call(text, plain=plain, special=special)
        if plain and len(text) > 1 and any(i in self.tokenizer.added_tokens_decoder for i, _ in found):
            # An added token that is not special is found even so: its halves are not.
            rest = self._ids(text[1:], plain=True, special=False, inside=True)
            head = self._ids(text[:1], plain=True, special=False, inside=inside)
            return head + [(i, (a + 1, b + 1)) for i, (a, b) in rest]
        return found

    def _call(self, text: str, *, plain: bool, special: bool) -> list[tuple[int, tuple[int, int]]]:
        found = self.tokenizer(
            text, add_special_tokens=special, split_special_tokens=plain, return_offsets_mapping=True
        )
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    def _trained(
        self, turns: Sequence[Turn], pieces: Sequence[_Piece], ids: Sequence[int], *, spans: Sequence[tuple[int, int]]
    ) -> list[bool]:
        """Ids of trained turns, each through the token that ends it."""
        last = [turn.trained and number == len(turn.parts) - 1 for turn in turns for number in range(len(turn.parts))]
        trained = [turn.trained for turn in turns for _ in turn.parts]
        flags = [False] * len(ids)
        for piece, start in zip(pieces, _starts(pieces), strict=False):
            if piece.kind != "words" or not trained[piece.part]:
                continue
            end = start + len(piece.text)
            for index, (a, b) in enumerate(spans):
                flags[index] |= a < end and b > start
            if last[piece.part]:
                self._close(flags, ids, spans, end=end)
        return flags

    def _close(self, flags: list[bool], ids: Sequence[int], spans: Sequence[tuple[int, int]], *, end: int) -> None:
        behind = [index for index, (a, b) in enumerate(spans) if a >= end and b > a]
        for nth, index in enumerate(behind):
            if ids[index] in self.stops:
                for between in behind[: nth + 1]:
                    flags[between] = True
                return
            if nth > _NEAR:
                break
        raise ConfigError(
            f"the chat template closes a trained turn without a token that ends answers (ids {sorted(self.stops)}): "
            "the model would never learn to stop",
            place=str(self.tokenizer.name_or_path),
            remedy="use a chat template that writes the end-of-turn token after an answer",
        )


_NEAR = 4
"""Ids between an answer and the token that ends it."""


def _said(role: Literal["user", "assistant"], text: str) -> Turn:
    return Turn(role=role, parts=(Text(text=text),))


def _starts(pieces: Sequence[_Piece]) -> list[int]:
    """Where each piece begins in the text, and where the text ends."""
    found = [0]
    for piece in pieces:
        found.append(found[-1] + len(piece.text))
    return found
