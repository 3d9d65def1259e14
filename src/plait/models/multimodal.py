"""``MultimodalLM``: encoders + connectors + a Hugging Face decoder, composed by passing modules."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Batch, Output, Patches
from plait.models.attention import positions
from plait.models.crossattend import GatedCrossAttention, MediaView, install, latest_item
from plait.models.decoding import Decoding
from plait.models.documents import documents_for
from plait.models.fused_head import fuses, token_logprobs
from plait.models.mixtral import routing
from plait.models.output_head import float32_scores
from plait.models.packing import packed_masks


class MultimodalLM(nn.Module):
    """A decoder that reads media of any number of modalities.

    Spliced in, each placeholder is replaced by the connector's next token (LLaVA, arXiv 2304.08485). Read inside, an
    item has one placeholder, whose embedding is learned, and gated cross-attention layers look at the connector's
    tokens (Flamingo, arXiv 2204.14198): each position at those of the latest item before it in its sample.

    Media of a modality come in the order in which their placeholders stand in the batch, row by row.

    Placeholders are ids of the tokenizer beyond the decoder's vocabulary, so they have no embedding, and no decoder can
    ever write them.

    Attributes:
        fused: Whether the forward computes log-probabilities and head in one (:mod:`plait.models.fused_head`), where
            the head is a plain linear layer; else losses are left to all scores at once.

    Args:
        encoders: One tower a modality.
        connectors: One connector a modality; reads what the tower of that name gives.
        decoder: A causal language model of Hugging Face (its ``base_model`` and output embeddings are used).
        placeholder: Id that stands for one media token; one for each modality where there are several.
        reading: Cross-attention before each layer of the decoder, None where there is none; put in place here.
        inside: The modality that they read; the others are spliced in.

    Raises:
        ConfigError: Modalities, connectors and placeholders do not fit together.

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
        placeholder: int | Mapping[str, int],
        reading: Sequence[GatedCrossAttention | None] | None = None,
        inside: str = "",
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.connectors = nn.ModuleDict(connectors)
        self.decoder = decoder
        self.placeholders: dict[str, int] = (
            dict(placeholder) if isinstance(placeholder, Mapping) else dict.fromkeys(connectors, placeholder)
        )
        self.inside = inside
        self.fused = True
        self._check_parts(reading)
        table: Tensor = decoder.get_input_embeddings().weight  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue, reportAssignmentType]
        self._check_widths(reading, width=table.shape[1])
        if reading is not None:
            install(decoder, reading)
            self.mark = nn.Parameter(torch.zeros(table.shape[1]))

    def _check_parts(self, reading: Sequence[GatedCrossAttention | None] | None) -> None:
        if set(self.placeholders) != set(self.connectors) or not set(self.encoders) <= set(self.connectors):
            raise ConfigError(
                f"encoders {sorted(self.encoders)}, connectors {sorted(self.connectors)}, placeholders "
                f"{sorted(self.placeholders)}",
                remedy="give every modality a connector and a placeholder",
            )
        if len(set(self.placeholders.values())) != len(self.placeholders):
            raise ConfigError(
                f"modalities share a placeholder: {self.placeholders}", remedy="give each modality an id of its own"
            )
        if (reading is not None) != bool(self.inside) or (self.inside and self.inside not in self.connectors):
            raise ConfigError(
                f"cross-attention layers {'are' if reading is not None else 'are not'} given, the modality they read "
                f"is {self.inside!r}",
                remedy="give both, and a modality that has a connector",
            )

    def _check_widths(self, reading: Sequence[GatedCrossAttention | None] | None, *, width: int) -> None:
        for modality, connector in self.connectors.items():
            given, wanted = (
                getattr(self.encoders[modality], "d_out", None) if modality in self.encoders else None,
                getattr(connector, "d_in", None),
            )
            if given is not None and wanted is not None and given != wanted:
                raise ConfigError(
                    f"the {modality} tower gives tokens of width {given}, its connector takes {wanted}",
                    place=f"connectors.{modality}",
                    remedy=f"build the connector with d_in={given}",
                )
            readers = [reads for reads in reading or () if reads is not None]
            into = {reads.attention.sizes.d_source for reads in readers} if modality == self.inside else {width}
            if into != {connector.d_out}:
                raise ConfigError(
                    f"the {modality} connector gives tokens of width {connector.d_out}, what reads them takes "
                    f"{', '.join(map(str, sorted(into)))}",
                    place=f"connectors.{modality}",
                    remedy="build the connector for the width of the decoder, or of the layers that read inside it",
                )
            if any(reads.attention.sizes.d != width for reads in readers):
                raise ConfigError(
                    f"a cross-attention is built for a decoder of another width than {width}",
                    place="reading",
                    remedy=f"build it with d={width}",
                )

    @property
    def placeholder(self) -> int:
        """The placeholder of the only modality, or of pictures."""
        return self.placeholders["image"] if "image" in self.placeholders else next(iter(self.placeholders.values()))

    @property
    def head(self) -> nn.Module:
        """What makes scores of hidden states."""
        head = self.decoder.lm_head
        assert isinstance(head, nn.Module)
        return head

    @property
    def device(self) -> torch.device:
        """Where the decoder's word embeddings are."""
        return self.decoder.get_input_embeddings().weight.device  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

    def slots(self, modality: str, grid: Int[Tensor, "item 3"]) -> Int[Tensor, " item"]:
        """The token account: placeholders that each item of these features has in the text."""
        return self.slot_grid(modality, grid).prod(1)

    def slot_grid(self, modality: str, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """How an item's placeholders lie: as the connector's tokens, or one that stands for all that is read inside."""
        if modality == self.inside:
            return torch.ones_like(grid)
        return self.connectors[modality].grid_out(grid)  # pyright: ignore[reportCallIssue]

    def forward(self, batch: Batch) -> Output:
        """Hidden states everywhere; what is said of the next token only where it is trained, in reading order."""
        with routing(self.decoder, batch.segment_ids) as choices:
            hidden = self.hidden(batch)
        trained = hidden[batch.predicting]
        logprobs = token_logprobs(self.head, trained, batch.targets) if self.fused and fuses(self.head) else None
        return Output(
            hidden=hidden,
            score=lambda: self.logits(trained),
            logprobs=logprobs,
            balance=torch.stack([one.balance() for one in choices]).sum() if choices else None,
            dropped=torch.stack([one.dropped for one in choices]).sum() if choices else None,
        )

    def hidden(self, batch: Batch) -> Float[Tensor, "b t d"]:
        """The decoder's last hidden states; samples of one row do not see each other."""
        embedded, view = self.inputs(batch)
        masks = packed_masks(self.decoder, batch.segment_ids, embedded.dtype)
        return self._decode(
            view,
            inputs_embeds=embedded,
            attention_mask=masks,
            position_ids=positions(batch.segment_ids),
            use_cache=False,
            **documents_for(self.decoder, batch.segment_ids, masks),
        ).last_hidden_state

    def prefill(self, batch: Batch) -> Decoding:
        """Read prompts, one a row, padded in front: the first step of an answer."""
        embedded, view = self.inputs(batch)
        seen = batch.segment_ids
        out = self._decode(
            view,
            inputs_embeds=embedded,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
        )
        return Decoding(hidden=out.last_hidden_state[:, -1], cache=out.past_key_values, seen=seen, kept=view)

    def extend(self, decoding: Decoding, token_ids: Int[Tensor, " b"], *, last: int) -> Decoding:
        """Read one more token a row.

        Args:
            decoding: From :meth:`prefill` or this; its cache is changed.
            token_ids: Of the decoder's vocabulary.
            last: Position that no token goes beyond.
        """
        seen = torch.cat([decoding.seen, decoding.seen.new_ones(len(token_ids), 1)], dim=1)
        out = self._decode(
            decoding.kept,  # its last row is what the prompt's last token saw: the latest item, for all that follow
            input_ids=token_ids[:, None],
            attention_mask=seen,
            position_ids=(seen.sum(1, keepdim=True) - 1).clamp(max=last),
            past_key_values=decoding.cache,
            use_cache=True,
        )
        return Decoding(hidden=out.last_hidden_state[:, -1], cache=out.past_key_values, seen=seen, kept=decoding.kept)

    def _decode(self, view: MediaView | None, **inputs: Any) -> Any:
        """The decoder without its head; media that are read inside go with the call."""
        if view is None:
            return self.decoder.base_model(**inputs)  # pyright: ignore[reportCallIssue]
        out = self.decoder.base_model(**inputs, media=view)  # pyright: ignore[reportCallIssue]
        if not view.readers:
            raise ConfigError(
                f"{type(self.decoder).__name__} does not hand its arguments on to its layers: no media were read",
                remedy="use a decoder of LLaMA's kin or GPT-2, or splice media in",
            )
        return out

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Scores of the next token, in float32 (:func:`plait.models.output_head.float32_scores`)."""
        return float32_scores(self.head, hidden)

    def inputs(self, batch: Batch) -> tuple[Float[Tensor, "b t d"], MediaView | None]:
        """What the decoder gets: embeddings with media in their places, and what its cross-attention looks at.

        Raises:
            DataError: A modality is unknown, or the tokens of media are not those their placeholders stand for, item by
                item; says row, sample and both numbers.
        """
        unknown = set(batch.media) - set(self.connectors)
        if unknown:
            raise DataError(
                f"the batch has {', '.join(sorted(unknown))}, this model reads {', '.join(sorted(self.connectors))}",
                place=some(batch.sample_ids),
                remedy="leave those media out, or build the model with a connector for them",
            )
        holes = {modality: batch.token_ids == number for modality, number in self.placeholders.items()}
        anywhere = torch.stack(list(holes.values())).any(0)
        words = self.words(batch.token_ids.masked_fill(anywhere, 0))
        view = None
        for modality, places in holes.items():
            media, item_row = self.media_tokens(batch, modality)
            if modality == self.inside and len(media.grid):
                marks = Patches(values=self.mark.expand(len(media.grid), -1), grid=torch.ones_like(media.grid))
                check_places(batch, places, media=marks, item_row=item_row)
                view = latest_item(media, item_row=item_row, marks=places, segment_ids=batch.segment_ids)
                media = marks
            else:
                check_places(batch, places, media=media, item_row=item_row)
            words = words.masked_scatter(places[..., None], media.values.to(words.dtype))
        return words, view

    def words(self, token_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """The decoder's own embeddings."""
        return self.decoder.get_input_embeddings()(token_ids)  # pyright: ignore[reportCallIssue]

    def media_tokens(self, batch: Batch, modality: str) -> tuple[Patches, Int[Tensor, " item"]]:
        """Media of one modality as the connector gives them, in the batch's order, and the row of each item."""
        media = {str(name): found for name, found in batch.media.items()}.get(modality)
        item_row = {str(name): found for name, found in batch.item_row.items()}.get(modality)
        if media is None:
            weight: Tensor = self.decoder.get_input_embeddings().weight  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue, reportAssignmentType]
            none = batch.token_ids.new_zeros(0, 3)
            width = int(self.connectors[modality].d_out)  # pyright: ignore[reportArgumentType]
            values = torch.zeros(
                0, width, dtype=weight.dtype, device=weight.device
            )  # not new_zeros: it may lie in pieces
            return Patches(values=values, grid=none), none[:, 0]
        features = media if batch.encoded else self.encoders[modality](media)
        connector = self.connectors[modality]
        # Cached features are 16-bit; the connector, which is trained, may well be wider.
        wide = next((p.dtype for p in connector.parameters() if p.is_floating_point()), features.values.dtype)
        found = connector(Patches(values=features.values.to(wide), grid=features.grid))
        return found, features.grid.new_zeros(0) if item_row is None else item_row


def check_places(batch: Batch, holes: Bool[Tensor, "b t"], *, media: Patches, item_row: Int[Tensor, " item"]) -> None:
    """Each item's tokens must go to the row it belongs to, and all of them into one sample.

    Raises:
        DataError: They do not; says row, sample and both numbers.
    """
    tokens = media.grid.prod(1)
    if len(item_row) != len(tokens) or int(tokens.sum()) != len(media.values):
        raise DataError(
            f"{len(tokens)} media items of {int(tokens.sum())} tokens by their grids; {len(item_row)} items have a "
            f"row, {len(media.values)} tokens came",
            place=some(batch.sample_ids),
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
            return DataError(cause, place=f"row {row}, {some(names[row])}", remedy=remedy)
    if item_row != sorted(item_row) or any(not 0 <= row < len(names) for row in item_row):
        cause = f"media items are not in the order of the batch's {len(names)} rows: {item_row}"
        return DataError(cause, place=some(batch.sample_ids), remedy=remedy)
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
                return DataError(cause, place=f"row {row}, {some(sample)}", remedy=remedy)
            number += 1
    raise AssertionError("only called when something is misplaced")


def _samples_of_rows(batch: Batch) -> list[tuple[str, ...]]:
    """Ids of the samples of each row; all of them where rows and ids do not tell."""
    counts = batch.segment_ids.amax(1).tolist()
    if sum(counts) != len(batch.sample_ids):
        return [batch.sample_ids] * len(counts)
    ids = iter(batch.sample_ids)
    return [tuple(next(ids) for _ in range(count)) for count in counts]


def some(sample_ids: tuple[str, ...]) -> str:
    """A place for errors: the first samples, and how many more."""
    if not sample_ids:
        return "no sample"
    more = f" and {len(sample_ids) - 4} more" if len(sample_ids) > 4 else ""
    return f"{'sample' if len(sample_ids) == 1 else 'samples'} {', '.join(sample_ids[:4])}{more}"
