"""What the align stage will need, from its settings alone: nothing is written and no weight loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from plait.core.estimate import Estimate, Machine, made_before, peak_of, picture_slots
from plait.stages.validating import judged_samples
from plait.training import cost, peak

if TYPE_CHECKING:
    from plait.stages.align import Align

# As in the tune stage: tokens of a prompt with its picture and answer, and of the answer alone.
_ANSWER_TOKENS, _TRAINED_TOKENS, _PICTURE_TOKENS = 30, 4, 6
_FILLED = 0.85  # share of a row that is not padding
_RANK = 16
_TOWER_WEIGHTS = 4_652_008  # efficientnet-lite0
_FILES = 7_000_000  # of a checkpoint beside adapter and connector: tokenizer, word embeddings
_SECONDS_START = (2.0, 12.0)  # reading the decoder, and a few answers before and after


def estimate(spec: Align, machine: Machine, before: Mapping[str, Estimate], *, pairs: int) -> Estimate:
    """What the stage will need; see :meth:`plait.stages.stage.Stage.estimate`.

    Args:
        spec: The stage.
        machine: What the machine can do.
        before: Estimates of the stages before, by kind.
        pairs: Most pairs that are learned from.
    """
    made = made_before(before)
    shape = cost.DecoderShape(**dict[str, Any](made.decoder)) if made and made.decoder else cost.SMOLLM2_135M
    lora = cost.Lora(rank=_RANK, targets=tuple(shape.matrices()))
    weights = made.adapter if made and made.adapter else lora.params(shape)
    lora = cost.Lora(rank=max(1, round(_RANK * weights / lora.params(shape))), targets=lora.targets)
    connectors = made.connectors if made else 0
    slots = picture_slots(before, _PICTURE_TOKENS)
    answer = _ANSWER_TOKENS - _PICTURE_TOKENS + slots
    rows, length = 2 * spec.batch_size, math.ceil(answer / _FILLED)
    trained = 2 * spec.batch_size * _TRAINED_TOKENS
    passes = math.ceil((pairs + judged_samples(spec.trainer, spec.steps)) / spec.batch_size)
    scored = 2 * math.ceil(spec.test_pairs / spec.batch_size)
    sizes: dict[str, Any] = {"rows": rows, "length": length, "head_positions": trained, "lora": lora}
    flops = spec.steps * cost.decoder_flops(shape, gradients="through", recompute=spec.trainer.recompute, **sizes)
    # Without gradients an adapter costs a third of what it does in training, which is little enough to be left so.
    flops += (passes + scored) * cost.decoder_flops(shape, gradients="none", **sizes)
    low, high = cost.time_range(flops, machine)
    kept = cost.decoder_activations(
        shape,
        rows=rows,
        length=length,
        dtype=machine.dtype,
        gradients="through",
        attention=answer,
        lora=lora,
        recompute=spec.trainer.recompute,
    )
    learn, state = weights + (connectors if spec.connector else 0), spec.trainer.state_bytes()
    memory = peak.peak_memory(
        machine,
        frozen=shape.params + _TOWER_WEIGHTS,
        frozen_dtype=machine.dtype,
        trainable=learn,
        state=state,
        activations=kept
        + cost.head_bytes(shape, trained, dtype=machine.dtype, head=spec.trainer.head, device=machine.device),
        caches=peak.TOKENIZER_BYTES * shape.vocab + peak.LEFT_BYTES,
        async_save=spec.trainer.async_save,
    )
    memory = peak.in_turn(memory)
    memory["weights"] += 4 * (weights + connectors - learn)
    one = peak.checkpoint_bytes(weights=4 * (weights + connectors) + _FILES, trainable=learn, state=state)
    tokens = (spec.steps + passes + scored) * rows * length
    return Estimate(
        stage=spec.kind,
        params_trainable=learn,
        params_frozen=shape.params,
        tokens=tokens,
        image_tokens=int(tokens * _FILLED * slots / answer),
        flops=flops,
        **peak_of({"training": memory}),
        disk_bytes=one * peak.checkpoints_left(spec.steps, spec.save_every, judged=spec.trainer.judged_every),
        spare_bytes=one,
        seconds=(low + _SECONDS_START[0], high + _SECONDS_START[1]),
        notes=(
            f"{spec.steps:,} steps of {spec.batch_size:,} pairs, after one pass for the reference",
            f"sizes are those of smollm2 with adapters of rank {_RANK} on all projections",
        ),
    )
