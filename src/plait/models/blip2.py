"""BLIP-2's first stage: a Q-Former learns what of a picture matters to language, by three tasks at once.

Li et al., https://arxiv.org/abs/2301.12597, section 3.1. The second stage is a
:class:`~plait.models.multimodal.MultimodalLM` with the same Q-Former as its connector.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Batch, Patches
from plait.models.connectors.query import QFormer
from plait.models.dual import limited
from plait.models.heads import MaskedHead, MatchingHead, QueryContrastHead
from plait.models.ragged import Rows, rows_of

Choose = Callable[[Float[Tensor, "b b"]], tuple[Int[Tensor, " k"], Int[Tensor, " k"]]]
"""Further pairs to judge, given how similar all pictures and texts of the batch are: pictures, and their texts."""


class ThreeTasks(NamedTuple):
    """What the three tasks are trained on.

    Attributes:
        similarity: Contrast (ITC): of picture i and text j, divided by the temperature.
        match: Matching (ITM): scores of no and yes for each pair of the batch, then for those that were chosen.
        logits: Generation (ITG): scores of the next token where it is trained, in reading order.
    """

    similarity: Float[Tensor, "b b"]
    match: Float[Tensor, "k 2"]
    logits: Float[Tensor, "n v"]


class Blip2Stage1(nn.Module):
    """A picture tower, a Q-Former that reads text beside its queries, and a head for each task.

    Texts begin with a token whose state stands for the text (``[CLS]``); to write, it is replaced by ``start``
    (``[DEC]``), so that the Q-Former knows what is asked of it.

    Args:
        tower: Picture encoder, frozen or not; batches whose media are encoded already do not run it.
        qformer: Built with a vocabulary.
        start: Token id in place of the first one where text is written.
        d_shared: Width of the space in which pictures and texts are compared.
        scale: Where the learned factor on similarities starts, 1 / temperature.

    Raises:
        ConfigError: The Q-Former knows no text, or not the token ``start``; or tower and Q-Former differ in width.
    """

    def __init__(
        self, tower: nn.Module, qformer: QFormer, *, start: int, d_shared: int = 256, scale: float = 1 / 0.07
    ) -> None:
        super().__init__()
        vocabulary, d = qformer.sizes.vocabulary, qformer.sizes.d
        if not 0 <= start < vocabulary:
            raise ConfigError(
                f"text is begun with token {start}, the Q-Former has {vocabulary} tokens",
                place="Blip2Stage1",
                remedy="build it with the tokenizer's vocabulary and one token more",
            )
        d_tower = getattr(tower, "d_out", qformer.d_in)
        if d_tower != qformer.d_in:
            raise ConfigError(
                f"the tower gives tokens of width {d_tower}, the Q-Former takes {qformer.d_in}",
                place="Blip2Stage1",
                remedy=f"build it with d_source={d_tower}",
            )
        self.tower, self.qformer, self.start = tower, qformer, start
        self.contrast = QueryContrastHead(d, d_shared)
        self.matching = MatchingHead(d)
        self.writing = MaskedHead(d, vocabulary)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """Factor on similarities, at most :data:`~plait.models.dual.MAX_SCALE`."""
        return limited(self.log_scale)

    def forward(self, batch: Batch, *, choose: Choose | None = None) -> ThreeTasks:
        """All three tasks; the tower runs once.

        Args:
            batch: One picture and one text a row; segment 0 is padding; labels are those of generation.
            choose: Chooses pairs that are judged besides the batch's own, such as hard negatives.

        Raises:
            DataError: Pictures and rows are not as many, or not in order, or a row has no text.
        """
        source = self.look(batch)
        ids, present = batch.token_ids, batch.segment_ids != 0
        odd = ~present[:, 0] | (batch.segment_ids > 1).any(1)
        if bool(odd.any()):
            raise DataError(
                f"row {int(odd.nonzero()[0])} has no text at its beginning, or several texts",
                place=f"samples {', '.join(batch.sample_ids[:4])}",
                remedy="give one text a row, padding behind it, and leave out pictures without one",
            )
        similarity = self.scale * self.contrast.similarity(self.embed_image(source), self.embed_text(ids, present))
        pictures = texts = torch.arange(len(ids), device=ids.device)
        if choose is not None:
            more = choose(similarity.detach())
            pictures, texts = (
                torch.cat([own, other.to(own)]) for own, other in zip((pictures, texts), more, strict=True)
            )
        judged = self.judge(_picked(source, pictures), ids[texts], present[texts])
        # The scores of a whole vocabulary are the largest tensor here: only those that are trained are made.
        return ThreeTasks(similarity, judged, self._told(self._before(source, ids, present)[batch.predicting]))

    def look(self, batch: Batch) -> Rows:
        """Tokens of the batch's pictures, one picture a row.

        Raises:
            DataError: Pictures and rows are not as many, or not in order.
        """
        media, items = batch.media.get("image"), batch.item_row.get("image")
        count = 0 if media is None else len(media.grid)
        in_order = items is None or items.tolist() == list(range(len(batch.token_ids)))
        if media is None or count != len(batch.token_ids) or not in_order:
            raise DataError(
                f"{count} pictures came for {len(batch.token_ids)} texts"
                + ("" if in_order or items is None else f", of rows {items.tolist()}"),
                place=f"samples {', '.join(batch.sample_ids[:4])}",
                remedy="give one picture and one text a row",
            )
        return self.tokens(media if batch.encoded else self.tower(media))

    def tokens(self, features: Patches) -> Rows:
        """Features of the tower as rows, in the dtype of the Q-Former (cached ones are 16-bit)."""
        values, real = rows_of(features)
        return Rows(values.to(self.qformer.queries.dtype), real)

    def embed_image(self, source: Rows) -> Float[Tensor, "b q e"]:
        """Unit vectors of a picture's queries, which have seen no text."""
        return self.contrast.image_vectors(self.qformer.attend(source.values, real=source.real))

    def embed_text(self, ids: Int[Tensor, "b t"], present: Bool[Tensor, "b t"]) -> Float[Tensor, "b e"]:
        """Unit vectors of texts, which have seen no picture."""
        return self.contrast.text_vectors(self.qformer.attend(None, text=(ids, present, "contrast"))[:, 0])

    def judge(self, source: Rows, ids: Int[Tensor, "b t"], present: Bool[Tensor, "b t"]) -> Float[Tensor, "b 2"]:
        """Whether row i's text belongs to row i's picture: scores of no and yes."""
        both = self.qformer.attend(source.values, real=source.real, text=(ids, present, "match"))
        return self.matching(both[:, : self.qformer.sizes.queries])

    def write(self, source: Rows, ids: Int[Tensor, "b t"], present: Bool[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Scores of the token after each one, told from the queries and what stands before it."""
        return self._told(self._before(source, ids, present))

    @torch.no_grad()
    def caption(self, source: Rows, *, end: int, max_tokens: int) -> list[list[int]]:
        """The likeliest next token again and again, for each picture, until ``end`` or so many tokens.

        Args:
            source: From :meth:`look` or :meth:`tokens`.
            end: Token id that ends a text; it is not returned.
            max_tokens: Longest text returned.
        """
        ids = torch.full((len(source.values), 1), self.start, device=source.values.device)
        for _ in range(max_tokens):
            last = self._before(source, ids, torch.ones_like(ids, dtype=torch.bool))[:, -1]
            ids = torch.cat([ids, self._told(last).argmax(1, keepdim=True)], dim=1)
            if bool((ids == end).any(1).all()):
                break
        return [row[: row.index(end)] if end in row else row for row in ids[:, 1:].tolist()]

    def _before(self, source: Rows, ids: Int[Tensor, "b t"], present: Bool[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """States of text that is being written: each has seen the queries and what stands before it."""
        ids = torch.cat([torch.full_like(ids[:, :1], self.start), ids[:, 1:]], dim=1)
        both = self.qformer.attend(source.values, real=source.real, text=(ids, present, "generate"))
        return both[:, self.qformer.sizes.queries :]

    def _told(self, states: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Scores of the next token after each state."""
        assert self.qformer.embedding is not None
        return self.writing(states, self.qformer.embedding.weight)


def _picked(source: Rows, rows: Int[Tensor, " k"]) -> Rows:
    return Rows(source.values[rows], None if source.real is None else source.real[rows])
