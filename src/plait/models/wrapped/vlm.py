"""``WrappedVLM``: a vision-language model of Hugging Face as it is, with the face of ``MultimodalLM``."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.tensors import Batch, Output, Patches
from plait.models.attention import causal, same_segment
from plait.models.decoding import Decoding
from plait.models.fused_head import fuses, token_logprobs
from plait.models.multimodal import check_places, some
from plait.models.output_head import float32_scores
from plait.models.wrapped.families import FAMILIES, Family

_LAYERS = frozenset({"full_attention", "sliding_attention"})
_PACKS = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt"})
_PACKS |= {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}
# Decoders whose every layer heeds the mask and the positions that it is given; each was tried.


class WrappedVLM(nn.Module):
    """A vision-language model of Hugging Face, its weights and modules untouched.

    Media are what the model's own image processor makes of a picture (:mod:`plait.assembly.vlm_pictures`); which rows
    and grids these are is said by its family. Placeholders are the model's own: words that it knows and cannot be
    asked to write.

    Rows of one sample go the way that transformers goes: a mask of padding, on either side. Packed rows get a mask in
    which no sample sees another, and positions that begin anew with each.

    Attributes:
        fused: As :class:`plait.models.multimodal.MultimodalLM`; never where scores are changed after the head.

    Args:
        model: From ``AutoModelForImageTextToText``.

    Raises:
        CheckpointError: Its family is not known here, or the family has a form that is not.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config: Any = model.config
        if config.model_type not in FAMILIES:
            raise CheckpointError(
                f"model_type is {config.model_type!r}, which is no vision-language model that is known here",
                place="config.json: model_type",
                remedy=f"use one of: {', '.join(FAMILIES)}",
            )
        self.model = model
        self.fused = True
        self.family: Family = FAMILIES[config.model_type](config)

    @property
    def placeholder(self) -> int:
        """Id that stands for one token of a picture."""
        return self.family.placeholder

    @property
    def head(self) -> nn.Module:
        """What makes scores of hidden states."""
        head = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        assert isinstance(head, nn.Module)
        return head

    @property
    def device(self) -> torch.device:
        """Where the word embeddings are."""
        return self._words.weight.device

    @property
    def _words(self) -> Any:
        return self.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]

    def slots(self, modality: str, media: Patches) -> Int[Tensor, " item"]:
        """The token account: placeholders that each picture has in the text."""
        assert modality == "image"
        return self.family.slots(media)

    def forward(self, batch: Batch) -> Output:
        """Hidden states everywhere; what is said of the next token only where it is trained, in reading order."""
        hidden = self.hidden(batch)
        trained = hidden[batch.predicting]
        logprobs = (
            token_logprobs(self.head, trained, batch.targets)
            if self.fused and self.family.cap is None and fuses(self.head)
            else None
        )
        return Output(hidden=hidden, score=lambda: self.logits(trained), logprobs=logprobs)

    def hidden(self, batch: Batch) -> Float[Tensor, "b t d"]:
        """The decoder's last hidden states; samples of one row do not see each other.

        Raises:
            DataError: A modality is not a picture, pictures are features already, or their tokens are not those that
                their placeholders stand for; says row, sample and both numbers.
            ConfigError: Rows are packed, and this model's attention cannot be told so.
        """
        media = self._media(batch)
        place = self.family.positions(batch, media)
        return self._run(batch, media, place, use_cache=False).last_hidden_state

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Scores of the next token, in float32, with what the model itself does to them after its head."""
        scores = float32_scores(self.head, hidden)
        cap = self.family.cap
        return scores if cap is None else torch.tanh(scores / cap) * cap

    def prefill(self, batch: Batch) -> Decoding:
        """Read prompts, one a row, padded in front: the first step of an answer."""
        seen = batch.segment_ids
        media = self._media(batch)
        place = self.family.positions(batch, media)
        out = self._run(batch, media, place, use_cache=True)
        return Decoding(
            hidden=out.last_hidden_state[:, -1],
            cache=out.past_key_values,
            seen=seen,
            kept=self.family.keep(place, seen),
        )

    def extend(self, decoding: Decoding, token_ids: Int[Tensor, " b"], *, last: int) -> Decoding:
        """Read one more token a row.

        Args:
            decoding: From :meth:`prefill` or this; its cache is changed.
            token_ids: Words, no placeholders.
            last: Position that no token goes beyond.
        """
        seen = torch.cat([decoding.seen, decoding.seen.new_ones(len(token_ids), 1)], dim=1)
        out = self.family.run(
            self.model,
            input_ids=token_ids[:, None],
            attention_mask=seen,
            position_ids=self.family.next_positions(seen, decoding.kept, last=last),
            past_key_values=decoding.cache,
            use_cache=True,
        )
        return Decoding(hidden=out.last_hidden_state[:, -1], cache=out.past_key_values, seen=seen, kept=decoding.kept)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _run(self, batch: Batch, media: Patches | None, place: Tensor, *, use_cache: bool) -> Any:
        inputs: dict[str, Any] = {"input_ids": batch.token_ids, "position_ids": place, "use_cache": use_cache}
        if int(batch.segment_ids.max()) > 1:
            inputs["attention_mask"] = self._packed_mask(batch)
        else:
            inputs |= {"attention_mask": batch.segment_ids, **self.family.types(batch)}
        if media is not None:
            dtype: torch.dtype = self._words.weight.dtype
            found = self.family.pictures(media, per_sample=self._per_sample(batch, media))
            inputs |= {key: value.to(dtype) if value.is_floating_point() else value for key, value in found.items()}
        return self.family.run(self.model, **inputs)

    def _media(self, batch: Batch) -> Patches | None:
        """The batch's pictures, each as many tokens as it has placeholders."""
        unknown = set(batch.media) - {"image"}
        if unknown or (batch.media and batch.encoded):
            raise DataError(
                f"the batch has {', '.join(sorted(unknown)) or 'features of pictures'}, a wrapped model reads pictures "
                "as its own image processor makes them",
                place=some(batch.sample_ids),
                remedy="leave other media out, and prepare pictures with the model's own image processor",
            )
        media = batch.media.get("image")
        holes = batch.token_ids == self.placeholder
        tokens = batch.token_ids.new_zeros(0) if media is None else self.slots("image", media)
        item_row = batch.item_row["image"] if media is not None else tokens
        grid = torch.stack([torch.ones_like(tokens), torch.ones_like(tokens), tokens], dim=1)
        account = Patches(values=torch.zeros(int(tokens.sum()), 0, device=tokens.device), grid=grid)
        check_places(batch, holes, media=account, item_row=item_row)
        return media

    def _per_sample(self, batch: Batch, media: Patches) -> list[int]:
        """Pictures of each sample that has any, in order."""
        tokens = self.slots("image", media)
        first = tokens.cumsum(0) - tokens
        row, at = (batch.token_ids == self.placeholder).nonzero(as_tuple=True)
        sample = torch.stack([row, batch.segment_ids[row, at]], dim=1)[first]
        return torch.unique_consecutive(sample, dim=0, return_counts=True)[1].tolist()

    def _packed_mask(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Additive masks in which each sample sees itself alone, with what the family lets see each other."""
        text = self.family.text
        named = getattr(text, "layer_types", None)
        kinds = set(named or ["full_attention"])
        how = text._attn_implementation
        if text.model_type not in _PACKS or not kinds <= _LAYERS or how not in ("eager", "sdpa"):
            raise ConfigError(
                f"rows hold several samples, and {text.model_type} has layers ({', '.join(sorted(kinds))}; {how}) that "
                "are not known to keep them apart",
                place=some(batch.sample_ids),
                remedy="put one sample into a row; or take attention 'sdpa' or 'eager' and a decoder of "
                f"{', '.join(sorted(_PACKS))}",
            )
        t = batch.token_ids.shape[1]
        window = getattr(text, "sliding_window", None) or t
        local = (not named or "sliding_attention" in kinds) and window < t
        if local and not self.family.takes_masks:
            raise ConfigError(
                f"rows hold several samples in {t} tokens, and {text.model_type} has layers that look back only "
                f"{window}",
                place=some(batch.sample_ids),
                remedy=f"put one sample into a row, or at most {window} tokens",
            )
        seen = self._seen(batch)
        dtype: torch.dtype = self._words.weight.dtype
        if not self.family.takes_masks:
            return _additive(seen, dtype)
        index = torch.arange(t, device=seen.device)
        near = (index[:, None] - index) < window
        return {"full_attention": _additive(seen, dtype), "sliding_attention": _additive(seen & near, dtype)}

    def _seen(self, batch: Batch) -> Bool[Tensor, "b 1 t t"]:
        t = batch.token_ids.shape[1]
        seen = causal(t, device=batch.token_ids.device)
        groups = self.family.groups(batch)
        if groups is not None:
            seen = seen | ((groups[:, None, :, None] == groups[:, None, None, :]) & (groups >= 0)[:, None, None, :])
        # Padding sees itself, so that no row of the softmax is empty.
        return (seen & same_segment(batch.segment_ids)) | torch.eye(t, dtype=torch.bool, device=seen.device)


def _additive(seen: Bool[Tensor, "b 1 t t"], dtype: torch.dtype) -> Float[Tensor, "b 1 t t"]:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
