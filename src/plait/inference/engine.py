"""The engine: requests in, completions out, with a key-value cache; satisfies :class:`plait.core.protocols.Generate`.

Thin for now: requests are answered in batches of like length, each batch until its last row is finished.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from plait.core.errors import DataError
from plait.core.tensors import Batch, Patches
from plait.core.types import Completion, MediaRef, Request, Turn
from plait.inference.sampling import sample
from plait.models.multimodal import MultimodalLM

Finish = Literal["stop", "length"]


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
        model: In eval mode.
        render: Turns to the prompt's ids: the very function that training used.
        media: Pictures to their patches (features of the tower, or pixels when ``encoded`` is False).
        decode: Ids to text, without control tokens.
        stop: Id that ends an answer.
        context: Most tokens of prompt and answer together.
        rows: Requests answered together.
        encoded: Whether ``media`` gives features rather than pixels.
    """

    def __init__(
        self,
        model: MultimodalLM,
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
            DataError: A prompt with its answer is longer than the context; says by how much. Nothing is cut.
        """
        rows = [self._row(request) for request in requests]
        order = sorted(rows, key=lambda row: len(row.prompt.token_ids))
        for start in range(0, len(order), self.rows):
            for _ in self._answer(order[start : start + self.rows]):
                pass
        return [self._completion(row) for row in rows]

    def stream(self, request: Request) -> Iterator[str]:
        """Answer one request piece by piece: the text so far grows by each piece, whole characters only.

        Raises:
            DataError: As in a call.
        """
        row, said = self._row(request), ""
        for _ in self._answer([row]):
            text = self._text(row)
            # A character of several bytes may be unfinished: it is said when its last token is there.
            if text.startswith(said) and not text.endswith("\ufffd"):
                yield text[len(said) :]
                said = text
        if rest := self._text(row)[len(said) :]:
            yield rest

    # --- inside ----------------------------------------------------------------------------------------------------

    def _row(self, request: Request) -> _Row:
        prompt = self.render(request.turns)
        length = len(prompt.token_ids)
        if length + request.max_new_tokens > self.context:
            over = length + request.max_new_tokens - self.context
            raise DataError(
                f"the prompt has {length:,} tokens; with an answer of {request.max_new_tokens:,} that is {over:,} more "
                f"than the {self.context:,} the model can hold",
                place=f"request {request.id}",
                remedy=f"shorten the prompt or the answer by {over:,} tokens",
            )
        generator = torch.Generator().manual_seed(request.seed)
        return _Row(request=request, prompt=prompt, generator=generator)

    @torch.inference_mode()
    def _answer(self, rows: Sequence[_Row]) -> Iterator[None]:
        """Let every row grow to its end; yields after each token of the batch."""
        width = max(len(row.prompt.token_ids) for row in rows)
        seen = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            seen[number, width - len(row.prompt.token_ids) :] = 1
        embedded = self.model.embed(self._batch(rows, width))
        out = self.model.decoder(  # pyright: ignore[reportCallIssue]
            inputs_embeds=embedded,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        while True:
            chosen = [self._choose(row, out.logits[number, -1]) for number, row in enumerate(rows)]
            yield
            if all(row.finish for row in rows):
                return
            seen = torch.cat([seen, torch.ones(len(rows), 1, dtype=torch.long)], dim=1)
            out = self.model.decoder(  # pyright: ignore[reportCallIssue]
                input_ids=torch.tensor(chosen)[:, None],
                attention_mask=seen,
                position_ids=seen.sum(1, keepdim=True) - 1,
                past_key_values=out.past_key_values,
                use_cache=True,
            )

    def _batch(self, rows: Sequence[_Row], width: int) -> Batch:
        token_ids = torch.full((len(rows), width), self.stop, dtype=torch.long)
        for number, row in enumerate(rows):
            token_ids[number, width - len(row.prompt.token_ids) :] = torch.tensor(row.prompt.token_ids)
        refs = [ref for row in rows for ref in row.prompt.media]
        found: Mapping[Literal["image"], Patches] = {"image": self.media(refs)} if refs else {}
        return Batch(
            token_ids=token_ids,
            labels=torch.full_like(token_ids, -100),
            segment_ids=torch.ones_like(token_ids),
            media={**found},
            item_row={},
            sample_ids=tuple(row.request.id for row in rows),
            encoded=self.encoded,
        )

    def _choose(self, row: _Row, logits: Float[Tensor, " v"]) -> int:
        """The row's next token; a finished row goes on with the stop id, which nobody reads."""
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

    def _text(self, row: _Row) -> str:
        return self.decode(row.made)

    def _completion(self, row: _Row) -> Completion:
        placeholders = row.prompt.token_ids.count(self.model.placeholder)
        return Completion(
            id=row.request.id,
            text=self._text(row).strip(),
            token_ids=tuple(row.made),
            finish=row.finish or "length",
            prompt_tokens=len(row.prompt.token_ids),
            image_tokens=placeholders,
        )
