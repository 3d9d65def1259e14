"""How many scores of a vocabulary are held at once: for the fused head, and without torch for its estimate."""

from __future__ import annotations

SCORES = 2**25
"""On a CPU: 128 MiB in float32."""

ACCELERATED = 8
"""An accelerator wants larger products: so many times as many."""


def scores_held(device: str) -> int:
    """Scores that are held at once on a kind of device, such as ``cpu`` or ``cuda``.

    Example:
        >>> scores_held("cuda") // scores_held("cpu")
        8
    """
    return SCORES if device == "cpu" else ACCELERATED * SCORES
