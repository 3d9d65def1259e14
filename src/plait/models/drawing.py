"""One decoder that writes text and draws: picture codes stand behind its words, and it writes them one after another.

Ramesh et al., "Zero-shot text-to-image generation" (DALL-E), https://arxiv.org/abs/2102.12092.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE, Batch, Output
from plait.models.attention import positions
from plait.models.image_tokens import ImageTokenizer
from plait.models.output_head import float32_scores
from plait.models.packing import packed_masks


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureIds:
    """Token ids of pictures: start, end, then one for each code; a picture is start, its codes in raster order, end.

    Ids from ``words`` up to ``first`` are nobody's here: there :class:`~plait.models.multimodal.MultimodalLM` has its
    placeholders, which are read and never written.

    Attributes:
        words: Ids of the decoder's vocabulary, from 0.
        codes: Of the picture tokenizer.
        rows: Codes from top to bottom of every picture.
        columns: From left to right.
        first: Id of the start; at least ``words``, and beyond all placeholders.

    Example:
        >>> ids = PictureIds(words=100, codes=8, rows=1, columns=2, first=103)  # 100 to 102 may be placeholders
        >>> ids.row([7, 8], torch.tensor([[0, 5]]))[0].tolist()
        [7, 8, 103, 105, 110, 104]
    """

    words: int
    codes: int
    rows: int
    columns: int
    first: int

    def __post_init__(self) -> None:
        if self.first < self.words:
            raise ConfigError(
                f"pictures begin at id {self.first}, the decoder has words up to {self.words - 1}",
                place="PictureIds: first",
                remedy=f"choose {self.words} or more, beyond all placeholders",
            )

    @property
    def start(self) -> int:
        """Id before a picture's codes."""
        return self.first

    @property
    def end(self) -> int:
        """Id after them."""
        return self.first + 1

    @property
    def total(self) -> int:
        """Ids of all kinds, so every one is below it."""
        return self.first + 2 + self.codes

    @property
    def length(self) -> int:
        """Codes of a picture."""
        return self.rows * self.columns

    def picture(self, codes: Int[Tensor, "rows columns"]) -> Int[Tensor, " t"]:
        """Token ids of a picture.

        Raises:
            DataError: It is of another size, or has codes that do not exist.
        """
        if (
            tuple(codes.shape) != (self.rows, self.columns)
            or not 0 <= int(codes.min()) <= int(codes.max()) < self.codes
        ):
            raise DataError(
                f"codes {tuple(codes.shape)} from {int(codes.min())} to {int(codes.max())} came, expected "
                f"{self.rows} x {self.columns} from 0 to {self.codes - 1}",
                place="PictureIds.picture",
                remedy="scale the picture so that the tokenizer makes as many codes as the decoder was built to draw",
            )
        return torch.cat(
            [codes.new_tensor([self.start]), codes.flatten() + self.first + 2, codes.new_tensor([self.end])]
        )

    def row(
        self, text: Sequence[int], codes: Int[Tensor, "rows columns"], *, trained_text: bool = False
    ) -> tuple[Int[Tensor, " t"], Int[Tensor, " t"]]:
        """A training row and its labels: text, then its picture.

        Args:
            text: Token ids.
            codes: Of the picture.
            trained_text: Whether the words are learned too, as in DALL-E; else only the picture is.

        Raises:
            DataError: As :meth:`picture`; or the text has ids that are no words.
        """
        odd = [i for i in text if not 0 <= i < self.words]
        if odd:
            raise DataError(
                f"id {odd[0]} is no word: there are {self.words}", place="PictureIds.row", remedy="give text alone"
            )
        picture = self.picture(codes)
        ids = torch.cat([picture.new_tensor(list(text)), picture])
        labels = ids.clone()
        if not trained_text:
            labels[: len(text)] = IGNORE
        return ids, labels

    def drawn(self, token_ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
        """How many codes of a picture are due after each token: all after a start, 0 after the last; -1 outside.

        Example:
            With pictures of 2 codes: word, start, code, code, end, word give ``-1 2 1 0 -1 -1``.
        """
        at = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
        latest = torch.where(token_ids == self.start, at, -1).cummax(1).values
        left = self.length - (at - latest)
        return torch.where((latest >= 0) & (left >= 0), left, -1)

    def allowed(self, left: Int[Tensor, " n"]) -> Bool[Tensor, "n v"]:
        """Which ids may follow: words and a start outside of pictures, codes inside, the end after them.

        Args:
            left: Codes due, as :meth:`drawn` counts them.
        """
        ids, left = torch.arange(self.total, device=left.device), left[:, None]
        outside = (ids < self.words) | (ids == self.start)
        return torch.where(left > 0, ids > self.end, torch.where(left == 0, ids == self.end, outside))


class DrawingLM(nn.Module):
    """A causal language model of Hugging Face that also draws.

    Start, end and codes have an embedding and an output row of their own, beside the decoder's tables: its weights, its
    folder and its scores of words stay what they were, bit for bit, until it is trained. What may not follow (words
    inside a picture, codes outside, placeholders anywhere) has a score of minus infinity, while training too: so a
    picture has exactly its codes, and the objective of next tokens (``NextToken``) trains text and pictures alike.

    Args:
        decoder: The language model; its ``base_model``, its word embeddings and its head are used.
        tokenizer: Makes codes of pictures and pictures of codes; it is not trained here.
        ids: Where pictures stand behind the words.

    Raises:
        ConfigError: Vocabulary or codes are not as many as ``ids`` says.
    """

    def __init__(self, decoder: nn.Module, tokenizer: ImageTokenizer, ids: PictureIds) -> None:
        super().__init__()
        words: Tensor = decoder.get_input_embeddings().weight  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue, reportAssignmentType]
        if len(words) != ids.words or tokenizer.sizes.codes != ids.codes:
            raise ConfigError(
                f"the decoder has {len(words)} words and the tokenizer {tokenizer.sizes.codes} codes, the ids are for "
                f"{ids.words} and {ids.codes}",
                place="DrawingLM",
                remedy="make PictureIds from both",
            )
        self.decoder, self.ids = decoder, ids
        self.tokenizer = tokenizer.requires_grad_(False)
        own, d = ids.total - ids.first, words.shape[1]
        # As long as words are: longer ones would be all that a trained decoder sees.
        self.embedding = nn.Embedding(own, d, device=words.device, dtype=words.dtype)
        nn.init.normal_(self.embedding.weight, std=0.02 if words.is_meta else float(words.detach().float().std()))
        self.head = nn.Linear(d, own, bias=False, device=words.device, dtype=words.dtype)
        nn.init.normal_(self.head.weight, std=0.02)

    def train(self, mode: bool = True) -> "DrawingLM":
        """Train decoder and tables; the tokenizer stays as it is."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def forward(self, batch: Batch) -> Output:
        """Hidden states everywhere; logits, one for each id, only where the next token is trained.

        Raises:
            DataError: The batch has media, or ids that are neither words nor of pictures, or a trained token that may
                not stand where it does.
        """
        self._check(batch)
        hidden = self._hidden(
            self.embed(batch.token_ids),
            attention_mask=packed_masks(self.decoder, batch.segment_ids, self.embedding.weight.dtype),
            position_ids=positions(batch.segment_ids),
            use_cache=False,
        ).last_hidden_state
        places = batch.predicting
        allowed = self.ids.allowed(self.ids.drawn(batch.token_ids)[places])
        wanted = batch.targets
        if not bool(allowed.gather(1, wanted[:, None]).all()):
            raise DataError(
                "a trained token may not stand where it does: pictures are a start, "
                f"{self.ids.rows} x {self.ids.columns} codes and an end, whole and inside one sample",
                place=f"samples {', '.join(batch.sample_ids[:4])}",
                remedy="make rows with PictureIds.row, and pack whole samples",
            )
        scores = self.scores(hidden[places]).masked_fill(~allowed, float("-inf"))
        return Output(hidden=hidden, score=lambda: scores)

    def embed(self, token_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Embeddings of words, starts, ends and codes."""
        ours = token_ids >= self.ids.first
        words = self.decoder.get_input_embeddings()(token_ids.masked_fill(ours, 0))  # pyright: ignore[reportCallIssue]
        return torch.where(ours[..., None], self.embedding((token_ids - self.ids.first).clamp(min=0)), words)

    def scores(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Scores of every id before any is ruled out; minus infinity for ids that are nobody's."""
        head = self.decoder.lm_head
        assert isinstance(head, nn.Module)
        words, own = float32_scores(head, hidden), float32_scores(self.head, hidden)
        nobody = words.new_full((len(words), self.ids.first - self.ids.words), float("-inf"))
        return torch.cat([words[:, : self.ids.words], nobody, own.to(words.dtype)], dim=1)

    @torch.no_grad()
    def draw(
        self,
        texts: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b rows columns"]:
        """Codes of one picture for each text; only codes are ever chosen, and exactly as many as a picture has.

        Args:
            texts: Token ids of each.
            temperature: Scores are divided by it; 0 takes the best code.
            top_k: Choose among so many best codes; 0: all.
            generator: Of the choices.

        Raises:
            DataError: No texts.
        """
        if not texts:
            raise DataError("no texts to draw", place="DrawingLM.draw", remedy="give at least one")
        longest, device = max(map(len, texts)) + 1, self.embedding.weight.device
        token_ids = torch.zeros(len(texts), longest, dtype=torch.long, device=device)
        real = torch.zeros(len(texts), longest + self.ids.length, dtype=torch.long, device=device)
        for i, text in enumerate(texts):  # on the right, so that all pictures begin together
            token_ids[i, longest - len(text) - 1 :] = torch.tensor([*text, self.ids.start])
            real[i, longest - len(text) - 1 :] = 1
        place = (real.cumsum(1) - 1).clamp(min=0)
        cache, chosen = None, []
        for at in range(longest, longest + self.ids.length):
            out = self._hidden(
                self.embed(token_ids),
                attention_mask=real[:, :at],
                position_ids=place[:, at - token_ids.shape[1] : at],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            scores = float32_scores(self.head, out.last_hidden_state[:, -1])[:, 2:]
            chosen.append(_choose(scores, temperature, top_k=top_k, generator=generator))
            token_ids = chosen[-1][:, None] + self.ids.first + 2
        return torch.stack(chosen, dim=1).view(len(texts), self.ids.rows, self.ids.columns)

    def pictures(
        self,
        texts: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Pictures of texts, RGB in 0..1; see :meth:`draw`."""
        return self.tokenizer.decode(self.draw(texts, temperature=temperature, top_k=top_k, generator=generator))

    def _hidden(self, embedded: Tensor, **more: Any) -> Any:
        return self.decoder.base_model(inputs_embeds=embedded, **more)  # pyright: ignore[reportCallIssue]

    def _check(self, batch: Batch) -> None:
        ids = batch.token_ids
        nobody = (ids < 0) | ((ids >= self.ids.words) & (ids < self.ids.first)) | (ids >= self.ids.total)
        if batch.media or bool(nobody.any()):
            what = f"media ({', '.join(map(str, batch.media))})" if batch.media else f"id {int(ids[nobody][0])}"
            raise DataError(
                f"{what} came; this model reads words below {self.ids.words} and pictures as ids from "
                f"{self.ids.first} to {self.ids.total - 1}",
                place=f"samples {', '.join(batch.sample_ids[:4])}",
                remedy="make rows with PictureIds.row",
            )


def _choose(
    scores: Float[Tensor, "b v"], temperature: float, *, top_k: int, generator: torch.Generator | None
) -> Int[Tensor, " b"]:
    if not temperature:
        return scores.argmax(1)
    if top_k and top_k < scores.shape[1]:
        least = scores.topk(top_k, dim=1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    probability = (scores / temperature).softmax(1)
    where = scores.device if generator is None else generator.device  # one on the CPU draws the same on every machine
    return torch.multinomial(probability.to(where), 1, generator=generator)[:, 0].to(scores.device)
