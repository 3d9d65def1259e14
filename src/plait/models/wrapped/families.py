"""What each kind of vision-language model wants beside token ids: its pictures' form, positions, masks, account."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from plait.core.errors import CheckpointError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.models.attention import positions
from plait.models.output_head import changed_scores
from plait.models.position.multimodal import multimodal_coordinates

if TYPE_CHECKING:
    from torch import Tensor


class Family:
    """Pictures as one or more tiles of one size, each so many tokens; positions count up; words look back.

    Media of such a family are its processor's pixels, one row a pixel, grid ``(tiles, rows, columns)``.

    Args:
        config: Of the model.

    Attributes:
        takes_masks: Whether the model takes a mask of its own for each kind of layer.
        cap: Scores are ``cap * tanh(score / cap)``; None where they are what the head gives.
    """

    takes_masks = False
    cap: float | None = None

    def __init__(self, config: Any) -> None:
        self.config = config
        self.text = config.get_text_config()
        self.placeholder = int(config.image_token_id)

    def tokens_per_tile(self) -> int:
        """Tokens that a tile becomes."""
        raise NotImplementedError

    def slots(self, media: Patches) -> Tensor:
        """The token account: placeholders of each item."""
        return media.grid[:, 0] * self.tokens_per_tile()

    def pictures(self, media: Patches, *, per_sample: Sequence[int]) -> dict[str, Tensor]:
        """What the model calls its pictures.

        Args:
            media: Of the whole batch.
            per_sample: How many of them each sample has that has any, in order.
        """
        del per_sample
        return {"pixel_values": torch.cat(_tiles(media))}

    def positions(self, batch: Batch, media: Patches | None) -> Tensor:
        """Positions of every token, each sample's from the start."""
        del media
        return positions(batch.segment_ids)

    def next_positions(self, seen: Tensor, kept: Tensor | None, *, last: int) -> Tensor:
        """Positions of one more token a row."""
        del kept
        return (seen.sum(1, keepdim=True) - 1).clamp(max=last)

    def keep(self, place: Tensor, seen: Tensor) -> Tensor | None:
        """What :meth:`next_positions` needs of the prompt's positions."""
        del place, seen

    def groups(self, batch: Batch) -> Tensor | None:
        """Positions of one number here (0 or more) see each other, before and behind; None where none do."""
        del batch

    def types(self, batch: Batch) -> dict[str, Tensor]:
        """What tells the model itself of :meth:`groups`, one sample a row."""
        del batch
        return {}

    def run(self, model: Any, **inputs: Any) -> Any:
        """The model without its head."""
        return model.model(**inputs)


class Llava(Family):
    """LLaVA 1.5 (arXiv 2310.03744): every picture one square, of CLIP or SigLIP."""

    def tokens_per_tile(self) -> int:
        """Its cells, with CLIP's class token where the model keeps it."""
        vision = self.config.vision_config
        if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
            raise CheckpointError(
                f"LLaVA with a picture tower of type {vision.model_type!r}",
                place="config.json: vision_config",
                remedy="use a LLaVA with a CLIP or SigLIP tower",
            )
        classes = 1 if vision.model_type == "clip_vision_model" else 0
        cut = 1 if self.config.vision_feature_select_strategy == "default" else 0
        return (vision.image_size // vision.patch_size) ** 2 + classes - cut


def _tiles(media: Patches) -> list[Tensor]:
    """Pixels of each item as ``tile 3 h w``."""
    grids: list[list[int]] = media.grid.tolist()
    parts = media.values.split([tiles * h * w for tiles, h, w in grids])
    return [part.view(tiles, h, w, -1).permute(0, 3, 1, 2) for part, (tiles, h, w) in zip(parts, grids, strict=True)]


class Idefics3(Family):
    """Idefics3 and SmolVLM (arXiv 2408.12637, 2504.05299): a picture in tiles, and the whole of it once more."""

    def tokens_per_tile(self) -> int:
        """Its cells, as many as the connector leaves."""
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2

    def pictures(self, media: Patches, *, per_sample: Sequence[int]) -> dict[str, Tensor]:
        """All tiles as if of one sample, filled up to one size, and which pixels are real."""
        del per_sample
        tiles = _tiles(media)
        height, width = int(media.grid[:, 1].max()), int(media.grid[:, 2].max())
        count = int(media.grid[:, 0].sum())
        pixels = media.values.new_zeros(1, count, media.values.shape[1], height, width)
        mask = torch.zeros(1, count, height, width, dtype=torch.bool, device=pixels.device)
        at = 0
        for item in tiles:
            end = at + len(item)
            pixels[0, at:end, :, : item.shape[2], : item.shape[3]] = item
            mask[0, at:end, : item.shape[2], : item.shape[3]] = True
            at = end
        return {"pixel_values": pixels, "pixel_attention_mask": mask}


class QwenVL(Family):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL (arXiv 2409.12191, 2502.13923): any size, positions in time, row and column.

    Media are its processor's patches, flattened; the grid is the processor's own, in patches.
    """

    @property
    def side(self) -> int:
        """So many patches a side become one token."""
        return int(self.config.vision_config.spatial_merge_size)

    def slots(self, media: Patches) -> Tensor:
        """Cells of so many patches a side."""
        return media.grid.prod(1) // self.side**2

    def pictures(self, media: Patches, *, per_sample: Sequence[int]) -> dict[str, Tensor]:
        """Patches and their grid as they are."""
        del per_sample
        return {"pixel_values": media.values, "image_grid_thw": media.grid}

    def positions(self, batch: Batch, media: Patches | None) -> Tensor:
        """``3 b t``: time, row and column, each sample's from the start; 0 for padding."""
        found = batch.token_ids.new_zeros(3, *batch.token_ids.shape)
        merged = [] if media is None else [(t, h // self.side, w // self.side) for t, h, w in media.grid.tolist()]
        items = iter(merged)
        for row, segments in enumerate(batch.segment_ids):
            for segment in range(1, int(segments.max()) + 1):
                at = (segments == segment).nonzero()[:, 0]
                holes: list[bool] = (batch.token_ids[row, at] == self.placeholder).tolist()
                parts: list[int | tuple[int, int, int]] = []
                place = 0
                while place < len(holes):
                    if holes[place]:
                        t, h, w = next(items)
                        parts.append((t, h, w))
                        place += t * h * w
                    else:
                        words = next((n for n, hole in enumerate(holes[place:]) if hole), len(holes) - place)
                        parts.append(words)
                        place += words
                found[:, row, at] = multimodal_coordinates(parts).T.to(found.device)
        return found

    def keep(self, place: Tensor, seen: Tensor) -> Tensor:
        """How far positions lag behind the number of tokens, ``b 1``."""
        return place.amax((0, 2))[:, None] + 1 - seen.sum(1, keepdim=True)

    def next_positions(self, seen: Tensor, kept: Tensor | None, *, last: int) -> Tensor:
        """One number on all three axes, ``3 b 1``."""
        assert kept is not None
        return (super().next_positions(seen, None, last=last) + kept).expand(3, -1, -1)


class InternVL(Family):
    """InternVL (arXiv 2412.05271) in transformers' own form: tiles of a picture, and the whole of it once more."""

    def tokens_per_tile(self) -> int:
        """Its cells, as many as the connector leaves."""
        vision = self.config.vision_config
        sides = [
            int(size // patch * self.config.downsample_ratio)
            for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
        ]
        return sides[0] * sides[1]


class Onevision(Family):
    """LLaVA-OneVision (arXiv 2408.03326): a picture alone in tiles, its padding cut off; one of several as one square.

    Media have one row a tile: its pixels, and then the picture's height and width; the grid counts tiles.
    """

    @property
    def side(self) -> int:
        """Tokens of a tile, a side."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def slots(self, media: Patches) -> Tensor:
        """Of a picture alone: the whole, and what is left of its tiles; else the whole and a newline."""
        found = [
            self.side**2 + (1 if tiles == 1 else self._fine(height, width))
            for tiles, height, width in zip(media.grid[:, 0].tolist(), *self._sizes(media).T.tolist(), strict=True)
        ]
        return torch.tensor(found, dtype=torch.long, device=media.grid.device)

    def pictures(self, media: Patches, *, per_sample: Sequence[int]) -> dict[str, Tensor]:
        """Tiles filled up to the most of an item, sizes, and which pictures come together."""
        side = int(self.config.vision_config.image_size)
        tiles = media.values[:, :-2].view(len(media.values), -1, side, side).split(media.grid[:, 0].tolist())
        most = max(map(len, tiles))
        pixels = media.values.new_zeros(len(tiles), most, *tiles[0].shape[1:])
        for index, item in enumerate(tiles):
            pixels[index, : len(item)] = item
        return {
            "pixel_values": pixels,
            "image_sizes": self._sizes(media),
            "batch_num_images": torch.tensor(per_sample, device=pixels.device),
        }

    def _sizes(self, media: Patches) -> Tensor:
        first = media.grid[:, 0].cumsum(0) - media.grid[:, 0]
        return media.values[first, -2:].long()

    def _fine(self, height: int, width: int) -> int:
        """Tokens of the tiles together: rows of what is left when the padding is cut off, a newline behind each."""
        from transformers.models.llava_onevision.modeling_llava_onevision import (
            get_anyres_image_grid_shape,
            unpad_image,
        )

        pinpoints, size = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        down, across = get_anyres_image_grid_shape((height, width), pinpoints, size)
        canvas = torch.empty(1, down * self.side, across * self.side, device="meta")
        rows, columns = unpad_image(canvas, (height, width)).shape[1:]
        most = int(str(self.config.vision_aspect_ratio).removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self.side**2))
        if ratio > _SHRINKS:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return rows * (columns + 1)


_SHRINKS = 1.1
"""LLaVA-OneVision makes a picture smaller from this many times the most tokens a side on."""


class Gemma3(Family):
    """Gemma 3 (arXiv 2503.19786): every picture one square; its tokens see each other."""

    takes_masks = True

    def tokens_per_tile(self) -> int:
        """As many as the average over cells leaves."""
        return int(self.config.mm_tokens_per_image)

    def groups(self, batch: Batch) -> Tensor:
        """Each picture a group."""
        inside = batch.token_ids == self.placeholder
        before = torch.zeros_like(inside)
        before[:, 1:] = inside[:, :-1]
        return torch.where(inside, (inside & ~before).cumsum(1) - 1, -1)

    def types(self, batch: Batch) -> dict[str, Tensor]:
        """1 for a picture's tokens."""
        return {"token_type_ids": (batch.token_ids == self.placeholder).long()}


class PaliGemma(Family):
    """PaliGemma 1 and 2 (arXiv 2407.07726, 2412.03555): what is given sees itself whole; what is said looks back.

    What is said begins with the first trained token of a sample; a prompt is all given. Positions begin with 1.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.cap = getattr(self.text, "final_logit_softcapping", None)

    def tokens_per_tile(self) -> int:
        """Its cells."""
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def positions(self, batch: Batch, media: Patches | None) -> Tensor:
        """Likewise, from 1."""
        return super().positions(batch, media) + 1

    def next_positions(self, seen: Tensor, kept: Tensor | None, *, last: int) -> Tensor:
        """Likewise, from 1."""
        return super().next_positions(seen, kept, last=last) + 1

    def groups(self, batch: Batch) -> Tensor:
        """What is given, a group each sample."""
        given = self.types(batch)["token_type_ids"] == 0
        return torch.where(given & (batch.segment_ids > 0), batch.segment_ids - 1, -1)

    def types(self, batch: Batch) -> dict[str, Tensor]:
        """1 for what is said."""
        said = torch.zeros_like(batch.segment_ids)
        trained = batch.labels != IGNORE
        for segment in range(1, int(batch.segment_ids.max()) + 1):
            inside = batch.segment_ids == segment
            said += ((trained & inside).cumsum(1) > 0) & inside
        return {"token_type_ids": said}


class Blip2(Family):
    """BLIP-2 (arXiv 2301.12597) with a causal decoder: every picture so many tokens as there are queries."""

    def __init__(self, config: Any) -> None:
        if config.image_token_id is None:
            raise CheckpointError(
                "no id stands for a picture's token (image_token_index)",
                place="config.json",
                remedy="save the model once more with transformers 4.50 or later, with its processor",
            )
        super().__init__(config)
        if not config.use_decoder_only_language_model:
            raise CheckpointError(
                f"BLIP-2 with an encoder-decoder ({config.text_config.model_type})",
                place="config.json: text_config",
                remedy="use a BLIP-2 with OPT or another causal decoder",
            )
        scaled = changed_scores(self.text)
        if scaled:
            raise CheckpointError(
                f"the decoder changes its scores after the head ({', '.join(scaled)})",
                place="config.json: text_config",
                remedy="use a decoder without these settings, such as OPT",
            )

    def tokens_per_tile(self) -> int:
        """The queries."""
        return int(self.config.num_query_tokens)

    def run(self, model: Any, **inputs: Any) -> Any:
        """Its parts one after the other: the whole knows no cache."""
        ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values", None)
        words = model.get_input_embeddings()(ids)
        if pixels is not None:
            found = model.get_image_features(pixels, return_dict=True).pooler_output
            words = words.masked_scatter((ids == self.placeholder)[..., None], found.to(words.dtype))
        return model.language_model.base_model(inputs_embeds=words, **inputs)


FAMILIES: dict[str, type[Family]] = {
    "llava": Llava,
    "idefics3": Idefics3,
    "smolvlm": Idefics3,
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": QwenVL,
    "internvl": InternVL,
    "llava_onevision": Onevision,
    "gemma3": Gemma3,
    "paligemma": PaliGemma,
    "blip-2": Blip2,
}
"""``model_type`` → how it is called."""
