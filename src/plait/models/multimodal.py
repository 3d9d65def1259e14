"""``MultimodalLM``: encoders + connectors + a Hugging Face decoder, composed by passing modules."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.core.errors import DataError
from plait.core.tensors import IGNORE, Batch, Output
from plait.models.attention import causal_mask, positions


class MultimodalLM(nn.Module):
    """A decoder that reads media: each placeholder is replaced by the connector's next token (arXiv 2304.08485).

    The placeholder is an id of the tokenizer beyond the decoder's vocabulary, so it has no embedding, and no decoder
    can ever write it.

    Args:
        encoders: One tower a modality.
        connectors: One connector a modality; reads what the tower of that name gives.
        decoder: A causal language model of Hugging Face (its ``model`` and ``lm_head`` are called).
        placeholder: Id that stands for one media token.

    Example:
        ``MultimodalLM(encoders={"image": tower}, connectors={"image": Mlp(1280, 768, 576)}, decoder=llama,
        placeholder=49152)``
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        connectors: Mapping[str, nn.Module],
        decoder: nn.Module,
        *,
        placeholder: int,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.connectors = nn.ModuleDict(connectors)
        self.decoder = decoder
        self.placeholder = placeholder

    def forward(self, batch: Batch) -> Output:
        """Hidden states everywhere; logits only where the next token is trained, in reading order."""
        hidden = self.hidden(batch)
        return Output(hidden=hidden, logits=self.logits(hidden[predicting(batch.labels)]))

    def hidden(self, batch: Batch) -> Float[Tensor, "b t d"]:
        """The decoder's last hidden states; samples of one row do not see each other."""
        embedded = self.embed(batch)
        out = self.decoder.model(  # pyright: ignore[reportCallIssue]
            inputs_embeds=embedded,
            attention_mask=causal_mask(batch.segment_ids, embedded.dtype),
            position_ids=positions(batch.segment_ids),
            use_cache=False,
        )
        return out.last_hidden_state

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Scores of the next token."""
        return self.decoder.lm_head(hidden)  # pyright: ignore[reportCallIssue]

    def embed(self, batch: Batch) -> Float[Tensor, "b t d"]:
        """Word embeddings, with media tokens in place of the placeholders.

        Raises:
            DataError: Placeholders and media tokens differ in number; says the samples and both numbers.
        """
        holes = batch.token_ids == self.placeholder
        words = self.words(batch.token_ids.masked_fill(holes, 0))
        filled = self.media_tokens(batch, words.dtype)
        self._check(batch, holes, len(filled))
        return words.masked_scatter(holes[..., None], filled)

    def words(self, token_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """The decoder's own embeddings."""
        return self.decoder.get_input_embeddings()(token_ids)  # pyright: ignore[reportCallIssue]

    def media_tokens(self, batch: Batch, dtype: torch.dtype) -> Float[Tensor, "n d"]:
        """All media of the batch as decoder inputs, in the order of their placeholders."""
        width = self.decoder.get_input_embeddings().weight.shape[1]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        found = [torch.zeros(0, width, dtype=dtype, device=batch.token_ids.device)]
        for modality, media in batch.media.items():
            features = media if batch.encoded else self.encoders[modality](media)
            found.append(self.connectors[modality](features).values.to(dtype))
        return torch.cat(found)

    def _check(self, batch: Batch, holes: Bool[Tensor, "b t"], given: int) -> None:
        wanted = int(holes.sum())
        if wanted != given:
            raise DataError(
                f"{wanted} placeholders in the batch, {given} media tokens for them",
                place=f"samples {', '.join(batch.sample_ids[:4])}",
                remedy="render and collate with the token account (grid_out) of this very model",
            )


def predicting(labels: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Positions whose next token is trained."""
    out = torch.zeros_like(labels, dtype=torch.bool)
    out[:, :-1] = labels[:, 1:] != IGNORE
    return out
