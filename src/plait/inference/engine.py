"""The engine: requests in, completions out, with a key-value cache; satisfies :class:`plait.core.protocols.Generate`.

Thin for now: requests are answered in batches of like length, each batch until its last row is finished.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from plait.core.errors import DataError, NumericsError, UsageError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.core.types import Completion, MediaRef, Modality, Request, Turn
from plait.data.collate import joined
from plait.inference.sampling import sample
from plait.models.decoding import Decodes

Finish = Literal["stop", "length"]


class ContextError(DataError):
    """A prompt with its answer is longer than what the model can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A request's turns as ids, with the placeholders of its pictures expanded.

    Attributes:
        token_ids: Ids up to where the assistant begins.
        media: Pictures, in the order of their placeholders.
    """

    token_ids: tuple[int, ...]
    media: tuple[MediaRef, ...] = ()


@dataclass(slots=True, kw_only=True)
class _Row:
    """One request at work."""

    request: Request
    prompt: Prompt
    generator: torch.Generator
    made: list[int] = field(default_factory=list[int])
    finish: Finish | None = None


class Engine:
    """Answers requests with a model.

    Args:
        model: In eval mode; what it reads is put on the device of its word embeddings.
        render: Turns to the prompt's ids: the very function that training used.
        media: Pictures to their patches (features of the tower, or pixels when ``encoded`` is False).
        decode: Ids to text, without control tokens; more ids only add to the text of fewer, but for an unfinished
            character at the end (tokenizers of Hugging Face: ``clean_up_tokenization_spaces=False``).
        stop: Id that ends an answer.
        context: Most tokens of prompt and answer together.
        rows: Requests answered together.
        encoded: Whether ``media`` gives features rather than pixels.
    """

    def __init__(
        self,
        model: Decodes,
        *,
        render: Callable[[Sequence[Turn]], Prompt],
        media: Callable[[Sequence[MediaRef]], Patches],
        decode: Callable[[Sequence[int]], str],
        stop: int,
        context: int,
        rows: int = 32,
        encoded: bool = True,
    ) -> None:
        self.model = model
        self.render = render
        self.media = media
        self.decode = decode
        self.stop = stop
        self.context = context
        self.rows = rows
        self.encoded = encoded

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all requests, in their order.

        Raises:
            ContextError: A prompt with its answer is longer than the context; says by how much. Nothing is cut.
            DataError: A request's pictures are not those its placeholders stand for.
            NumericsError: Scores are not numbers; says whose.
            UsageError: No answer of at least one token is asked for, or the temperature is negative.
        """
        rows = [self._row(request) for request in requests]
        order = sorted(rows, key=lambda row: len(row.prompt.token_ids))
        for start in range(0, len(order), self.rows):
            for _ in self._answer(order[start : start + self.rows]):
                pass
        return [self._completion(row) for row in rows]

    def stream(self, request: Request) -> Generator[str, None, Completion]:
        """Answer one request piece by piece: the text so far grows by each piece, whole characters only.

        There is a piece a token, empty where the token finishes no character, so that whoever reads may stop at any
        token. The pieces together are the text that a call gives, and the generator returns what a call returns. Faults
        of the request are raised here, before the first piece is asked for.

        Raises:
            ContextError: As in a call.
            DataError: As in a call.
            UsageError: As in a call.
        """
        return self._pieces(self._row(request))

    # --- inside ----------------------------------------------------------------------------------------------------

    def _pieces(self, row: _Row) -> Generator[str, None, Completion]:
        said = ""
        for _ in self._answer([row]):
            text = self.decode(row.made)
            # A character of several bytes may be unfinished: it is said when its last token is there.
            whole = text.startswith(said) and not text.endswith("\ufffd")
            yield text[len(said) :] if whole else ""
            said = text if whole else said
        if rest := self.decode(row.made)[len(said) :]:
            yield rest
        return self._completion(row)

    def _row(self, request: Request) -> _Row:
        if request.max_new_tokens < 1 or request.temperature < 0:
            raise UsageError(
                f"max_new_tokens is {request.max_new_tokens}, temperature {request.temperature:g}",
                place=f"request {request.id}",
                remedy="ask for at least one token, at a temperature of 0 or more",
            )
        prompt = self.render(request.turns)
        length = len(prompt.token_ids)
        if length + request.max_new_tokens > self.context:
            over = length + request.max_new_tokens - self.context
            raise ContextError(
                f"the prompt has {length:,} tokens; with an answer of {request.max_new_tokens:,} that is {over:,} more "
                f"than the {self.context:,} the model can hold",
                place=f"request {request.id}",
                remedy=f"shorten the prompt or the answer by {over:,} tokens",
            )
        generator = torch.Generator().manual_seed(request.seed)
        return _Row(request=request, prompt=prompt, generator=generator)

    def _answer(self, rows: Sequence[_Row]) -> Iterator[None]:
        """Let every row grow to its end; yields after each token of the batch."""
        if self.model.training:
            raise ValueError("the model is in training mode: dropout would change answers; call model.eval() first")
        # Around the calls and not around the whole: between tokens, the caller's own mode holds.
        with torch.inference_mode():
            state = self.model.prefill(self._batch(rows))
        while True:
            chosen = self._chosen(rows, self._scores(state.hidden))
            yield
            if all(row.finish for row in rows):
                return
            with torch.inference_mode():
                # A finished row goes on while others do, past the context even: its position stops there.
                token_ids = torch.tensor(chosen, device=self.model.device)
                state = self.model.extend(state, token_ids, last=self.context - 1)

    def _scores(self, hidden: Float[Tensor, "b d"]) -> Float[Tensor, "b v"]:
        """Scores of the token after the last.

        Two dimensions on purpose: on a slice of three, torch copies the whole vocabulary's matrix once for every row
        (10 of 13 s for 32 rows of SmolLM2 on a CPU).
        """
        with torch.inference_mode():
            return self.model.logits(hidden)

    def _batch(self, rows: Sequence[_Row]) -> Batch:
        """Prompts with padding in front (segment 0), on the model's device."""
        width = max(len(row.prompt.token_ids) for row in rows)
        token_ids = torch.full((len(rows), width), self.stop, dtype=torch.long)
        seen = torch.zeros_like(token_ids)
        refs: dict[Modality, list[MediaRef]] = {}
        item_row: dict[Modality, list[int]] = {}
        for number, row in enumerate(rows):
            start = width - len(row.prompt.token_ids)
            token_ids[number, start:] = torch.tensor(row.prompt.token_ids)
            seen[number, start:] = 1
            for ref in row.prompt.media:
                refs.setdefault(ref.modality, []).append(ref)
                item_row.setdefault(ref.modality, []).append(number)
        media: dict[Modality, Patches] = {}
        for modality, found in refs.items():
            media[modality], item_row[modality] = self._items(found, item_row[modality])
        return Batch(
            token_ids=token_ids,
            labels=torch.full_like(token_ids, IGNORE),
            segment_ids=seen,
            media=media,
            item_row={modality: torch.tensor(found) for modality, found in item_row.items()},
            sample_ids=tuple(row.request.id for row in rows),
            encoded=self.encoded,
        ).to(self.model.device)

    def _items(self, refs: Sequence[MediaRef], rows: Sequence[int]) -> tuple[Patches, list[int]]:
        """Patches, and the row of each of their items: a picture may be several (overview and tiles)."""
        together = self.media(refs)
        if len(together.grid) == len(refs):
            return together, list(rows)
        each = [self.media([ref]) for ref in refs]
        return joined(each), [row for row, found in zip(rows, each, strict=True) for _ in range(len(found.grid))]

    def _chosen(self, rows: Sequence[_Row], logits: Float[Tensor, "b v"]) -> list[int]:
        """The next token of every row; all of them come to the CPU at once, where each request's generator is."""
        here = logits.cpu()
        bad = here.isnan().any(1).tolist()
        for row, broken in zip(rows, bad, strict=True):
            if broken and not row.finish:
                raise NumericsError(
                    f"the scores of token {len(row.made) + 1} of the answer are not numbers",
                    place=f"request {row.request.id}",
                    remedy="look at the model's weights and the picture's features; in float16, use bfloat16",
                )
        return [self._choose(row, here[number]) for number, row in enumerate(rows)]

    def _choose(self, row: _Row, logits: Float[Tensor, " v"]) -> int:
        """The row's next token; a finished row goes on with padding, which nobody reads."""
        if row.finish:
            return self.stop
        token = sample(logits, temperature=row.request.temperature, generator=row.generator)
        if token == self.stop:
            row.finish = "stop"
        else:
            row.made.append(token)
            if len(row.made) == row.request.max_new_tokens:
                row.finish = "length"
        return token

    def _completion(self, row: _Row) -> Completion:
        placeholders = row.prompt.token_ids.count(self.model.placeholder)
        return Completion(
            id=row.request.id,
            text=self.decode(row.made),
            token_ids=tuple(row.made),
            finish=row.finish or "length",
            prompt_tokens=len(row.prompt.token_ids),
            image_tokens=placeholders,
        )
