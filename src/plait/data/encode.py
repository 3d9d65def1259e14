"""Media through an encoder: read, checked against their digests, decoded, prepared, encoded; kept in 16 bits."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from plait.core.errors import DataError, NumericsError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.core.types import MediaRef
from plait.data.media import STORED, decode_image
from plait.data.sounds import Sound, decode_sound
from plait.data.videos import Video, open_video

_BATCH = 16


def encode_media(
    refs: Sequence[MediaRef],
    *,
    read: Callable[[MediaRef], bytes],
    prepare: Callable[[Any], Patches],
    encoder: Encoder,
) -> tuple[Tensor, list[list[int]]]:
    """Features of media in 16 bits, and of each the grid of its items, one after the other.

    Features are kept as they are if the encoder puts out 16 bits, else in float16 (relative error at most 2^-11).

    Args:
        refs: Pictures, sounds or videos.
        read: Gives the encoded bytes of one.
        prepare: Decoded medium to what the encoder reads; one item or several.
        encoder: These to features.

    Returns:
        Rows of all media (``n d``), and of each medium frames, rows and columns of each of its items, in one list.

    Raises:
        DataError: A medium cannot be read or decoded, its bytes are not those its sha256 names, or the encoder does not
            keep its token account.
        NumericsError: A feature is not finite in 16 bits.
    """
    values: list[Tensor] = []
    grids: list[list[int]] = []
    for start in range(0, len(refs), _BATCH):
        batch = refs[start : start + _BATCH]
        prepared = [prepare(_decoded(ref, _bytes(ref, read))) for ref in batch]
        raw = Patches(values=torch.cat([p.values for p in prepared]), grid=torch.cat([p.grid for p in prepared]))
        with torch.inference_mode():
            features = encoder(raw)
        expected = encoder.grid_out(raw.grid)
        if not features.grid.equal(expected) or len(features.values) != int(expected.prod(1).sum()):
            raise DataError(
                f"the encoder put out {len(features.values)} rows for a grid of {expected.prod(1).sum()}",
                place=f"{batch[0].uri} and {len(batch) - 1} more",
                remedy="mend the encoder's grid_out",
            )
        kept = _in_16_bits(features.values)
        if not kept.isfinite().all():
            bad = kept.isfinite().all(1).logical_not().nonzero()[0, 0]
            ends = expected.prod(1).cumsum(0)[torch.tensor([len(p.grid) for p in prepared]).cumsum(0) - 1]
            picture = int((ends <= bad).sum())
            raise NumericsError(
                f"features are not finite in {kept.dtype}; the encoder's largest is {features.values.abs().max():.3g}",
                place=batch[picture].uri,
                remedy="run the encoder in bfloat16 if they are merely large; else look at the picture and the weights",
            )
        values.append(kept)
        grids += [part.flatten().tolist() for part in expected.split([len(p.grid) for p in prepared])]
    return torch.cat(values), grids


def _decoded(ref: MediaRef, data: bytes) -> Image.Image | Sound | Video:
    if ref.modality == "audio":
        return decode_sound(data, place=ref.uri)
    if ref.modality == "video":
        return open_video(data, place=ref.uri)
    return decode_image(data, place=ref.uri, limits=STORED)


def _bytes(ref: MediaRef, read: Callable[[MediaRef], bytes]) -> bytes:
    data = read(ref)
    found = hashlib.sha256(data).hexdigest()
    if found != ref.sha256:
        raise DataError(
            f"{len(data):,} bytes with sha256 {found[:12]}, expected {ref.sha256[:12]}: not what it was",
            place=ref.uri,
            remedy="make the data stage again",
        )
    return data


def _in_16_bits(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.bfloat16, torch.float16) else values.to(torch.float16)
