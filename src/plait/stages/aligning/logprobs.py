"""How likely a model finds every answer of a source of pairs."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from plait.assembly.multimodal import Multimodal
from plait.core import mesh
from plait.core.device import Compute
from plait.core.tensors import Batch
from plait.objectives.preference import answer_logprobs
from plait.training.precision import autocast


def logprobs_of(built: Multimodal, batches: Iterable[Batch], compute: Compute) -> dict[str, float]:
    """Log-probability of every answer, by its id, in the number format of training; of those of all processes."""
    found: dict[str, float] = {}
    for batch in batches:
        with torch.no_grad(), autocast(compute.device, compute.dtype):
            logprobs = answer_logprobs(built.model, batch.to(torch.device(compute.device)))
            found |= zip(batch.sample_ids, logprobs.tolist(), strict=True)
    return {name: value for part in mesh.gather(found) for name, value in part.items()}
