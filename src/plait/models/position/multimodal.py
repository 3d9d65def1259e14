"""Coordinates of a sequence of text and media for M-RoPE: time, row, column of every token."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def multimodal_coordinates(parts: Sequence[int | tuple[int, int, int]]) -> Int[Tensor, "t 3"]:
    """Time, row and column of every token (Qwen2-VL, section 2.1 of https://arxiv.org/abs/2409.12191).

    Text counts up on all three axes. A picture of ``frames x rows x columns`` tokens starts at the next free number:
    time says the frame, row and column the place in it. What follows starts one above the largest number so far, so a
    picture takes as many numbers as its longest side, not as many as its tokens.

    Args:
        parts: In reading order: a number of text tokens, or the token grid of a media item.

    Example:
        >>> multimodal_coordinates([1, (1, 2, 2), 1]).tolist()
        [[0, 0, 0], [1, 1, 1], [1, 1, 2], [1, 2, 1], [1, 2, 2], [3, 3, 3]]
    """
    found: list[Tensor] = []
    start = 0
    for part in parts:
        if isinstance(part, int):
            found.append(torch.arange(start, start + part)[:, None].expand(-1, 3))
            start += part
        else:
            found.append(torch.cartesian_prod(*(torch.arange(start, start + side) for side in part)))
            start += max(part)
    return torch.cat(found) if found else torch.zeros(0, 3, dtype=torch.long)
