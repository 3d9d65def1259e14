"""``MultimodalLM``: encoders + connectors + a Hugging Face decoder, composed by passing modules."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.core.errors import DataError
from plait.core.tensors import IGNORE, Batch, Output, Patches
from plait.models.attention import causal_mask, positions
from plait.models.output_head import float32_scores


class MultimodalLM(nn.Module):
    """A decoder that reads media: each placeholder is replaced by the connector's next token (arXiv 2304.08485).

    Media come in the order in which their placeholders stand in the batch, row by row. One placeholder stands for
    every modality, so a batch may hold one modality only (others in other batches).

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
        """Scores of the next token, in float32 (:func:`plait.models.output_head.float32_scores`)."""
        head = self.decoder.lm_head
        assert isinstance(head, nn.Module)
        return float32_scores(head, hidden)

    def embed(self, batch: Batch) -> Float[Tensor, "b t d"]:
        """Word embeddings, with media tokens in place of the placeholders.

        Raises:
            DataError: The batch has more than one modality, or the tokens of its media are not those its placeholders
                stand for, item by item; says row, sample and both numbers.
        """
        holes = batch.token_ids == self.placeholder
        words = self.words(batch.token_ids.masked_fill(holes, 0))
        media, item_row = self.media_tokens(batch)
        _check_places(batch, holes, media=media, item_row=item_row)
        return words.masked_scatter(holes[..., None], media.values.to(words.dtype))

    def words(self, token_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """The decoder's own embeddings."""
        return self.decoder.get_input_embeddings()(token_ids)  # pyright: ignore[reportCallIssue]

    def media_tokens(self, batch: Batch) -> tuple[Patches, Int[Tensor, " item"]]:
        """The batch's media as decoder inputs, in the order in which the batch holds them, and the row of each item.

        Raises:
            DataError: The batch has more than one modality.
        """
        if len(batch.media) > 1:
            raise DataError(
                f"{len(batch.media)} modalities in one batch ({', '.join(batch.media)}); which of them a placeholder "
                "stands for is not kept",
                place=_some(batch.sample_ids),
                remedy="put samples of one modality in a batch",
            )
        for modality, media in batch.media.items():
            features = media if batch.encoded else self.encoders[modality](media)
            connector = self.connectors[modality]
            # Cached features are 16-bit; the connector, which is trained, may well be wider.
            wide = next((p.dtype for p in connector.parameters() if p.is_floating_point()), features.values.dtype)
            rows = batch.item_row.get(modality, features.grid.new_zeros(0))
            return connector(Patches(values=features.values.to(wide), grid=features.grid)), rows
        weight: Tensor = self.decoder.get_input_embeddings().weight  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue, reportAssignmentType]
        none = batch.token_ids.new_zeros(0, 3)
        return Patches(values=weight.new_zeros(0, weight.shape[1]), grid=none), none[:, 0]


def predicting(labels: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Positions whose next token is trained."""
    out = torch.zeros_like(labels, dtype=torch.bool)
    out[:, :-1] = labels[:, 1:] != IGNORE
    return out


def _check_places(batch: Batch, holes: Bool[Tensor, "b t"], *, media: Patches, item_row: Int[Tensor, " item"]) -> None:
    """Each item's tokens must go to the row it belongs to, and all of them into one sample."""
    tokens = media.grid.prod(1)
    if len(item_row) != len(tokens) or int(tokens.sum()) != len(media.values):
        raise DataError(
            f"{len(tokens)} media items of {int(tokens.sum())} tokens by their grids; {len(item_row)} items have a "
            f"row, {len(media.values)} tokens came",
            place=_some(batch.sample_ids),
            remedy="give the row of every item in Batch.item_row, and let grid_out and forward of the connector agree",
        )
    hole_row, hole_at = holes.nonzero(as_tuple=True)
    if len(hole_row) == len(media.values):
        segment = batch.segment_ids[hole_row, hole_at]
        first = (tokens.cumsum(0) - tokens).repeat_interleave(tokens)
        row = item_row.repeat_interleave(tokens)
        if bool(((hole_row == row) & (segment == segment[first])).all()):
            return
    raise _misplaced(batch, holes, tokens=tokens.tolist(), item_row=item_row.tolist())


def _misplaced(batch: Batch, holes: Bool[Tensor, "b t"], *, tokens: list[int], item_row: list[int]) -> DataError:
    """What does not fit: the first row with more or fewer tokens than placeholders, else the first sample."""
    remedy = "render and collate with the token account (grid_out) of this very model, items in the order of their rows"
    names = _samples_of_rows(batch)
    for row, wanted in enumerate(holes.sum(1).tolist()):
        items = [n for n, r in zip(tokens, item_row, strict=True) if r == row]
        if wanted != sum(items):
            cause = f"row {row} has {wanted} placeholders, {sum(items)} media tokens ({len(items)} items of {items})"
            return DataError(cause, place=f"row {row}, {_some(names[row])}", remedy=remedy)
    if item_row != sorted(item_row) or any(not 0 <= row < len(names) for row in item_row):
        cause = f"media items are not in the order of the batch's {len(names)} rows: {item_row}"
        return DataError(cause, place=_some(batch.sample_ids), remedy=remedy)
    number = 0
    for row, segments in enumerate(batch.segment_ids.tolist()):
        places = [s for s, hole in zip(segments, holes[row].tolist(), strict=True) if hole]
        while places:
            item, places = places[: tokens[number]], places[tokens[number] :]
            if len(set(item)) > 1:
                cause = (
                    f"media item {number} has {tokens[number]} tokens, only {item.count(item[0])} placeholders of its "
                    "sample are left; the rest would go into the next sample of the row"
                )
                known = item[0] > 0 and len(names[row]) == max(segments)
                sample = names[row][item[0] - 1 :][:1] if known else names[row]
                return DataError(cause, place=f"row {row}, {_some(sample)}", remedy=remedy)
            number += 1
    raise AssertionError("only called when something is misplaced")


def _samples_of_rows(batch: Batch) -> list[tuple[str, ...]]:
    """Ids of the samples of each row; all of them where rows and ids do not tell."""
    counts = batch.segment_ids.amax(1).tolist()
    if sum(counts) != len(batch.sample_ids):
        return [batch.sample_ids] * len(counts)
    ids = iter(batch.sample_ids)
    return [tuple(next(ids) for _ in range(count)) for count in counts]


def _some(sample_ids: tuple[str, ...]) -> str:
    if not sample_ids:
        return "no sample"
    more = f" and {len(sample_ids) - 4} more" if len(sample_ids) > 4 else ""
    return f"{'sample' if len(sample_ids) == 1 else 'samples'} {', '.join(sample_ids[:4])}{more}"
