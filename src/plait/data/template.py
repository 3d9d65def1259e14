"""Turns to token ids, and which of them are trained, through the tokenizer's own chat template.

What a person types never becomes a control token: contents are tokenized apart from the template around them, with
special tokens switched off. The same function renders for training and for serving, so the ids cannot differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plait.core.errors import ConfigError, DataError
from plait.core.types import MediaRef, Sample, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters: no template writes them, and no text may smuggle one in.
_MARK = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as ids.

    Attributes:
        token_ids: Text ids, and the placeholder id once for each token of a picture.
        trained: Whether a loss is taken on predicting this id; same length.
        media: Pictures in reading order.
        slots: How many placeholders each picture takes, in the same order.
    """

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    media: tuple[MediaRef, ...] = ()
    slots: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    def expect_trained(self, place: str) -> Rendered:
        """This conversation, in which a loss is taken on something.

        Raises:
            DataError: Nothing in it is trained.
        """
        if not any(self.trained):
            raise DataError("no turn is trained", place=place, remedy="mark the assistant turns as trained")
        return self


class Template:
    """Renders turns through a tokenizer's chat template.

    Args:
        tokenizer: With a chat template; its end-of-turn token ends what is trained in an assistant turn.
        placeholder: Id that stands for one token of a picture; or one for each modality.
        slots: The token account: how many tokens a picture or sound becomes.

    Example, with a template that writes ``<user>…</s><assistant>…</s>``:
        ``[user: picture, "what?"] [assistant: "a cat", trained]`` becomes ``<user>▢▢▢▢what?</s><assistant>a cat</s>``,
        where ``a cat</s>`` is trained and ▢ is the placeholder.

    Raises:
        ConfigError: The tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        placeholder: int | Mapping[str, int],
        slots: Callable[[MediaRef], int],
    ) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template",
                place=str(tokenizer.name_or_path),
                remedy="use an instruction-tuned decoder, or put a chat_template.jinja beside its tokenizer",
            )
        self.tokenizer = tokenizer
        self.placeholders = placeholder if isinstance(placeholder, Mapping) else {"image": placeholder}
        self.slots = slots

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
            DataError: There is no turn, a trained turn holds a picture or nothing, the template refuses the roles, or a
                text holds a reserved character.
            ConfigError: The template does not end a trained turn with the end-of-turn token: a model trained on that
                would never learn to stop.
        """
        for turn in turns:
            check_trainable(turn, place)
        contents = [part for turn in turns for part in turn.parts]
        trained = [turn.trained for turn in turns for _ in turn.parts]
        last = [number == len(turn.parts) - 1 for turn in turns for number in range(len(turn.parts))]
        text = self._skeleton(turns, prompt=prompt, place=place)
        ids: list[int] = []
        flags: list[bool] = []
        pieces = _MARK.split(text)
        open_turn = False
        for number, piece in enumerate(pieces):
            if number % 2 == 0:
                found = self._ids(piece, special=True)
                kept = self._closing(found, piece) if open_turn else 0
                flags += [index < kept for index in range(len(found))]
            else:
                index = int(piece)
                found = self._content(contents[index], place)
                flags += [trained[index]] * len(found)
                open_turn = trained[index] and last[index]
            ids += found
        media = tuple(part for part in contents if isinstance(part, MediaRef))
        return Rendered(
            token_ids=tuple(ids), trained=tuple(flags), media=media, slots=tuple(self.slots(ref) for ref in media)
        )

    def _skeleton(self, turns: Sequence[Turn], *, prompt: bool, place: str) -> str:
        """The template's own text, with a numbered mark where each content goes."""
        if not turns:
            raise DataError("there is no turn", place=place, remedy="give at least one user turn")
        number = iter(range(sum(len(turn.parts) for turn in turns)))
        messages = [
            {"role": turn.role, "content": "".join(f"\ue000{next(number)}\ue001" for _ in turn.parts)} for turn in turns
        ]
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            roles = ", ".join(turn.role for turn in turns)
            raise DataError(
                f"the chat template refuses the roles {roles}: {error}",
                place=place,
                remedy="let user and assistant alternate, or use another chat template",
            ) from error
        assert isinstance(text, str)
        seen = [int(mark) for mark in _MARK.findall(text)]
        if seen != list(range(len(seen))) or len(seen) != sum(len(turn.parts) for turn in turns):
            raise DataError(
                "the chat template drops or reorders turns",
                place=place,
                remedy="use a chat template that writes every turn once",
            )
        return text

    def _content(self, part: Text | MediaRef, place: str) -> list[int]:
        if isinstance(part, MediaRef):
            if part.modality not in self.placeholders:
                raise DataError(
                    f"a turn holds {part.modality}, this model reads {', '.join(self.placeholders)}",
                    place=place,
                    remedy=f"leave it out, or give the model an encoder and a connector for {part.modality}",
                )
            return [self.placeholders[part.modality]] * self.slots(part)
        if _MARK.search(part.text):
            raise DataError("the text holds U+E000, which is reserved", place=place, remedy="remove that character")
        return self._ids(part.text, special=False)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids

    def _closing(self, ids: list[int], text: str) -> int:
        """How many of the template's ids after a trained content are trained too: through the end-of-turn token."""
        end = self.tokenizer.eos_token_id
        if end not in ids:
            raise ConfigError(
                f"the chat template closes a trained turn with {text!r}, which does not hold the end-of-turn token "
                f"{self.tokenizer.eos_token!r} (id {end}): the model would never learn to stop",
                place=str(self.tokenizer.name_or_path),
                remedy="set the tokenizer's eos_token to the one that its chat template writes after an answer",
            )
        return ids.index(end) + 1


def check_trainable(turn: Turn, place: str) -> None:
    """Refuse a trained turn that no loss can be taken on.

    Raises:
        DataError: It holds a picture, or nothing.
    """
    if not turn.trained:
        return
    pictures = sum(isinstance(part, MediaRef) for part in turn.parts)
    if pictures:
        raise DataError(
            f"a trained {turn.role} turn holds {pictures} pictures; a placeholder is no word a model could write",
            place=place,
            remedy="put pictures into turns that are not trained",
        )
    if not turn.parts:
        raise DataError(
            f"a trained {turn.role} turn is empty",
            place=place,
            remedy='give it a text (an empty one, "", trains the end of the turn alone), or do not train it',
        )
