"""What the align stage will need, from its settings alone: nothing is written and no weight loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from plait.core.estimate import Estimate, Machine, made_before, picture_slots
from plait.stages.validating import judged_samples
from plait.training import cost, peak
from plait.training.parallel.messages import messages
from plait.training.parallel.share import Member, Model, by_process

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
    shape, dtype = cost.planned_decoder(before, machine)
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
    low, high = cost.time_range(flops, machine, dtype=dtype)
    learn, state = weights + (connectors if spec.connector else 0), spec.trainer.state_bytes()
    width = cost.BYTES[dtype]
    model = Model(
        shape=shape,
        width=width,
        lora=lora,
        adapter=weights,
        beside=learn - weights,
        media=connectors,
        still=width * _TOWER_WEIGHTS + 4 * (weights + connectors - learn),
    )
    one = peak.checkpoint_bytes(weights=4 * (weights + connectors) + _FILES, trainable=learn, state=state)
    tokens = (spec.steps + passes + scored) * rows * length
    return Estimate(
        stage=spec.kind,
        params_trainable=learn,
        params_frozen=shape.params,
        tokens=tokens,
        image_tokens=int(tokens * _FILLED * slots / answer),
        flops=flops,
        **by_process(
            spec.trainer.parallel,
            machine.processes,
            lambda member: _moments(spec, machine, model=model, member=member, dtype=dtype, row=(length, answer)),
            sent=lambda member: messages(
                member,
                model,
                positions=2 * member.rows(spec.batch_size) * length,
                micro=1,
                width=width,
                stream=width,
                again=spec.trainer.recompute == "full",
            ),
        ),
        disk_bytes=one * peak.checkpoints_left(spec.steps, spec.save_every, judged=spec.trainer.judged_every),
        spare_bytes=one,
        seconds=(low + _SECONDS_START[0], high + _SECONDS_START[1]),
        notes=(
            f"{spec.steps:,} steps of {spec.batch_size:,} pairs, after one pass for the reference",
            f"sizes are those of {'the decoder before' if made and made.decoder else 'smollm2'}, with adapters of rank "
            f"{lora.rank} on all projections",
        ),
    )


def _moments(
    spec: Align, machine: Machine, *, model: Model, member: Member, dtype: str, row: tuple[int, int]
) -> dict[str, dict[str, int]]:
    """Parts of memory in training, of one process.

    Args:
        spec: The stage.
        machine: What the machine can do.
        model: What trains.
        member: The process.
        dtype: Of the mathematics.
        row: Places of a row, and tokens in it.
    """
    held, shape = member.held(model), member.decoder(model.shape, loads=model)
    length, answer = row
    pairs = member.rows(spec.batch_size)
    activations = cost.decoder_activations(
        shape,
        rows=2 * pairs,
        length=length,
        dtype=dtype,
        gradients="through",
        attention=answer,
        lora=model.lora,
        recompute=spec.trainer.recompute,
    )
    if member.ends[1]:
        trained = 2 * pairs * _TRAINED_TOKENS
        head = spec.trainer.head
        activations += cost.head_bytes(shape, trained, dtype=dtype, head=head, device=machine.device)
    state = spec.trainer.state_bytes()
    memory = peak.peak_memory(
        machine,
        trainable=held.learn,
        state=state,
        activations=activations,
        caches=peak.TOKENIZER_BYTES * model.shape.vocab + peak.LEFT_BYTES,
        async_save=spec.trainer.async_save,
    )
    memory |= member.states(held, state=state, activations=memory["activations"])
    return {"training": peak.in_turn(memory), **member.apart("", held, memory, model=model.bytes)}
