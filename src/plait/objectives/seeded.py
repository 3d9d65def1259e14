"""Chance in an objective as a function of the seed and the samples: a resumed run draws what the whole run drew."""

import hashlib
from collections.abc import Sequence

import torch


def drawn_from(seed: int, sample_ids: Sequence[str]) -> torch.Generator:
    """A generator, on the CPU, that depends on nothing but the seed and the ids of a batch, in their order.

    Example:
        >>> one, two = (torch.rand((), generator=drawn_from(0, ["a", "b"])) for _ in range(2))
        >>> bool(one == two)
        True
    """
    names = "\0".join((str(seed), *sample_ids)).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(names).digest()[:8], "big") >> 1)
