"""Encoder and decoder in one, as T5: the decoder writes while it looks at what the encoder read.

Raffel et al., https://arxiv.org/abs/1910.10683.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.models.attention import Places, causal, real_keys
from plait.models.position.relative import BucketBias, gaps
from plait.models.transformer import Transformer, TransformerSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2SeqSizes:
    """Shape of an encoder and decoder.

    Attributes:
        transformer: Of the encoder's blocks; the decoder's have cross-attention besides.
        vocabulary: Token ids.
        depth_decoder: Blocks of the decoder; 0: as many as the encoder has.
        buckets: Of the relative bias.
        furthest: Distance from which on all are alike.
        tied: Whether the output layer is the embedding table.
        scaled: Whether hidden states are scaled by ``d ** -0.5`` before it (T5; v1.1 does not).
    """

    transformer: TransformerSizes
    vocabulary: int
    depth_decoder: int = 0
    buckets: int = 32
    furthest: int = 128
    tied: bool = True
    scaled: bool = True


T5_SMALL = Seq2SeqSizes(
    transformer=TransformerSizes(
        d=512, depth=6, heads=8, d_ff=2048, norm="rms", activation="relu", bias=False, scale=1.0, dropout=0.1
    ),
    vocabulary=32_128,
)
"""Attention scores are not divided: T5's weights start smaller instead."""


class EncoderDecoder(nn.Module):
    """Reads one text, writes another.

    Args:
        sizes: Shape.

    Example:
        >>> with torch.device("meta"):
        ...     t5 = EncoderDecoder(T5_SMALL)
        >>> sum(p.numel() for p in t5.parameters())
        60506624
    """

    def __init__(self, sizes: Seq2SeqSizes) -> None:
        super().__init__()
        inner = sizes.transformer
        self.sizes = sizes
        self.d_out = inner.d
        self.embedding = nn.Embedding(sizes.vocabulary, inner.d)
        self.encoder = Transformer(inner)
        self.decoder = Transformer(replace(inner, depth=sizes.depth_decoder or inner.depth, d_source=inner.d))
        self.encoder_bias, self.decoder_bias = (
            BucketBias(inner.heads, buckets=sizes.buckets, furthest=sizes.furthest, both_ways=both)
            for both in (True, False)
        )
        self.head = None if sizes.tied else nn.Linear(inner.d, sizes.vocabulary, bias=False)

    def forward(
        self,
        token_ids: Int[Tensor, "b s"],
        target_ids: Int[Tensor, "b t"],
        *,
        real: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Scores of the token after each target token.

        Args:
            token_ids: What is read.
            target_ids: What was written so far, from the start token on.
            real: Which of the read tokens are no padding.
        """
        return self.logits(self.decode(target_ids, self.encode(token_ids, real=real), real=real))

    def encode(
        self, token_ids: Int[Tensor, "b s"], *, real: Bool[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b s d"]:
        """Hidden states of the encoder."""
        mask = None if real is None else real_keys(real)
        bias = self.encoder_bias(_gap(token_ids))
        return self._dropped(self.encoder(self._embedded(token_ids), Places(mask=mask, bias=bias)))

    def decode(
        self,
        target_ids: Int[Tensor, "b t"],
        source: Float[Tensor, "b s d"],
        *,
        real: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Hidden states of the decoder."""
        mask = causal(target_ids.shape[1], device=target_ids.device)
        places = Places(mask=mask, bias=self.decoder_bias(_gap(target_ids)))
        seen = Places(mask=None if real is None else real_keys(real))
        return self._dropped(self.decoder(self._embedded(target_ids), places, source=source, source_places=seen))

    def logits(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Scores of the next token."""
        hidden = hidden * self.d_out**-0.5 if self.sizes.scaled else hidden
        return functional.linear(hidden, self.embedding.weight if self.head is None else self.head.weight)

    def _embedded(self, token_ids: Tensor) -> Tensor:
        return self._dropped(self.embedding(token_ids))

    def _dropped(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.sizes.transformer.dropout, self.training)


def _gap(token_ids: Int[Tensor, "b t"]) -> Int[Tensor, "t t 1"]:
    at = torch.arange(token_ids.shape[1], device=token_ids.device)[:, None]
    return gaps(at, at)
