"""DeepSpeed's JSON as settings of a stage.

Keys and their meaning: https://www.deepspeed.ai/docs/config-json/, schedules:
https://deepspeed.readthedocs.io/en/latest/schedulers.html; ``auto`` is filled in by Hugging Face's Trainer
(https://huggingface.co/docs/transformers/deepspeed).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.core.check import did_you_mean
from plait.core.errors import ConfigError
from plait.core.yamltext import is_mapping, leaves, read_text
from plait.recipes.foreign.account import Leaf, Ledger
from plait.recipes.foreign.deepspeed_keys import GROUPS, NEUTRAL, NVME, SECTIONS
from plait.recipes.foreign.target import OPTIMIZER, PARALLEL, SCHEDULE, Batch, Target, map_batch
from plait.stages.align import Align
from plait.stages.tune import Tune

_FP16 = "fp16.enabled"
_ZERO, _OPT, _SCHED = "zero_optimization", "optimizer.params", "scheduler.params"
_KINDS = {
    "adam": "adamw",
    "adamw": "adamw",
    "fusedadam": "adamw",
    "cpuadam": "adamw",
    "sgd": "sgd",
    "lion": "lion",
    "fusedlion": "lion",
    "muon": "muon",
    "adafactor": "adafactor",
}
_SAME_STEP = {
    "amsgrad": False,
    "maximize": False,
    "dampening": 0,
    "bias_correction": True,
}
_SAME_BITS = ("torch_adam", "fused", "foreach", "capturable", "differentiable")
_PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "adamw": {"weight_decay": "weight_decay", "betas": "betas", "eps": "eps"},
    "adamw-8bit": {"weight_decay": "weight_decay", "betas": "betas", "eps": "eps"},
    "lion": {"weight_decay": "weight_decay", "betas": "betas"},
    "muon": {"weight_decay": "weight_decay", "betas": "betas", "eps": "eps", "momentum": "momentum"},
    "sgd": {"weight_decay": "weight_decay", "momentum": "momentum"},
    "lars": {"weight_decay": "weight_decay", "momentum": "momentum"},
    "adafactor": {"weight_decay": "weight_decay", "beta2_decay": "memory", "d": "clip"},
}
"""Parameters of each optimizer, and what they are called here."""
_BATCH = Batch("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read_leaves(text: str, path: Path) -> list[Leaf]:
    """Every value of a DeepSpeed JSON with its line.

    Raises:
        ConfigError: It is not JSON, a key is given twice, or its top is no object.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}"
        raise ConfigError(f"not valid JSON: {error.msg}", place=place, remedy="mend the JSON") from error
    except RecursionError as error:
        raise ConfigError("not valid JSON: nested too deeply", place=str(path), remedy="flatten it") from error
    if not is_mapping(found):
        raise ConfigError("expected a JSON object", place=f"{path}:1", remedy="give a DeepSpeed configuration")
    tree = read_text(text.replace("\t", " "), str(path))  # JSON is YAML but for tabs, which strings cannot hold
    plain = tree.plain()
    return [
        Leaf(key := ".".join(keys), value, tree.nearest(keys)[0].source.where, key) for keys, value in leaves(plain)
    ]


def read(ledger: Ledger, target: Target) -> None:
    """Give every value of a DeepSpeed configuration its row.

    Raises:
        ConfigError: A value is not of its key's type, or sizes contradict each other.
    """
    _tidy(ledger)
    filled = {row.leaf.name for row in ledger.rows}
    _parallel(ledger)
    _optimizer(ledger, target)
    map_batch(ledger, target, _BATCH, filled=bool(filled & {_BATCH.all, _BATCH.one, _BATCH.accumulated}))
    _schedule(ledger, target)
    if "gradient_clipping" in ledger:
        ledger.maps("gradient_clipping", {"trainer.clip_norm": ledger.number("gradient_clipping") or None})
    _precision(ledger, target)
    _compile(ledger)
    _rest(ledger)


def _tidy(ledger: Ledger) -> None:
    """What nobody needs to read: values left to another, and sections that are off."""
    for leaf in ledger.waiting():
        head = leaf.key.partition(".")[0]
        if leaf.value == "auto":
            ledger.keeps(
                leaf.name, "Hugging Face's Trainer fills it in from its own arguments; here the recipe's stays"
            )
        elif leaf.name in SECTIONS and leaf.value in (False, None, {}):
            ledger.keeps(leaf.name, "off")
        elif leaf.name in SECTIONS:
            raise ledger.wrong(leaf.name, "a mapping")
        elif leaf.key == f"{head}.enabled" and head in SECTIONS and leaf.value is False:
            for other in ledger.waiting():
                if other.key.startswith(f"{head}."):
                    ledger.keeps(other.name, f"{head} is off")
    for leaf in ledger.waiting():  # what is not on is off
        head = leaf.key.partition(".")[0]
        on = f"{head}.enabled"
        if head in ("fp16", "bf16") and leaf.key != on and on not in ledger and leaf.name in ledger:
            ledger.keeps(leaf.name, f"{head} is not on")


# --- parallel ------------------------------------------------------------------------------------------------------


def _parallel(ledger: Ledger) -> None:
    stage = 0
    if f"{_ZERO}.stage" in ledger:
        stage = ledger.integer(f"{_ZERO}.stage")
        if stage > 3:
            raise ledger.wrong(f"{_ZERO}.stage", "0, 1, 2 or 3")
        ledger.maps(f"{_ZERO}.stage", {f"{PARALLEL}.zero": stage})
    for name in ("offload_optimizer", "offload_param"):
        _offload(ledger, f"{_ZERO}.{name}", stage=stage)
    for name in ("cpu_offload", "cpu_offload_params"):
        key = f"{_ZERO}.{name}"
        if key in ledger and ledger.flag(key) and stage:
            ledger.maps(key, {f"{PARALLEL}.offload": True}, "weights, gradients and moments, all that is in pieces")
        elif key in ledger:
            ledger.keeps(key, "nothing is in pieces (stage 0)" if ledger.flag(key) else "off")
    for key in ("tensor_parallel.autotp_size", "tensor_parallel.tp_size", "tensor_parallel.tp.tp_size"):
        _degree(ledger, key, "tensor")
    _degree(ledger, "sequence_parallel_size", "context")


def _degree(ledger: Ledger, key: str, name: str) -> None:
    if key not in ledger:
        return
    size = ledger.integer(key)
    if size > 1:
        ledger.maps(key, {f"{PARALLEL}.{name}": size})
    else:
        ledger.keeps(key, "off")


def _offload(ledger: Ledger, section: str, *, stage: int) -> None:
    if section in ledger:  # `"offload_param": null`
        ledger.keeps(section, "off")
        return
    device = f"{section}.device"
    if device not in ledger:
        on = any(leaf.key.startswith(f"{section}.") for leaf in ledger.waiting())
        for leaf in ledger.waiting() if on else ():
            if leaf.key.startswith(f"{section}."):
                ledger.drops(leaf.name, f"{device} is not given; set trainer.parallel.offload where it should be on")
        return
    where = ledger.word(device)
    if where not in ("cpu", "nvme", "none"):
        raise ledger.wrong(device, "cpu, nvme or none")
    if where == "none" or not stage:
        why = "off" if where == "none" else "nothing is in pieces (stage 0)"
        ledger.keeps(device, why)
        for leaf in ledger.waiting():
            if leaf.key.startswith(f"{section}."):
                ledger.keeps(leaf.name, why)
        return
    if where == "cpu":
        ledger.maps(device, {f"{PARALLEL}.offload": True}, "weights, gradients and moments, all that is in pieces")
    else:
        ledger.drops(device, "Plait keeps nothing on a disk; trainer.parallel.offload keeps it in the host's memory")
    if (pinned := f"{section}.pin_memory") in ledger:
        ledger.keeps(pinned, "what is moved to a GPU is pinned") if ledger.flag(pinned) else ledger.drops(
            pinned, "what is moved to a GPU is pinned; nothing to do"
        )


# --- optimizer -----------------------------------------------------------------------------------------------------


def _optimizer(ledger: Ledger, target: Target) -> None:
    kind = target.spec.trainer.optimizer.kind
    if "optimizer.type" in ledger:
        given = ledger.word("optimizer.type")
        known = _KINDS.get(given.lower())
        if known is None or (known == "adamw" and not _decoupled(ledger)):
            why = "decay within the gradient" if known else f"no {given}"
            ledger.drops("optimizer.type", f"Plait has {why}; the recipe's {kind} stays, with its own rates")
            for leaf in ledger.waiting():
                if leaf.key.startswith(f"{_OPT}."):
                    ledger.drops(leaf.name, f"of {given}, which is not mapped")
            return
        kind = known
        why = "Adam with decay apart from the gradient (adam_w_mode)" if given.lower() == "adam" else ""
        ledger.maps("optimizer.type", {f"{OPTIMIZER}.kind": kind}, why)
    _rates(ledger, target, kind)


def _decoupled(ledger: Ledger) -> bool:
    mode, decay = f"{_OPT}.adam_w_mode", f"{_OPT}.weight_decay"
    off = mode in ledger and not ledger.flag(mode)
    return not off or decay not in ledger or ledger.number(decay) == 0


def _rates(ledger: Ledger, target: Target, kind: str) -> None:
    peak = f"{_SCHED}.warmup_max_lr"
    if (lr := f"{_OPT}.lr") in ledger:
        rate = ledger.number(lr)
        if peak in ledger and ledger.number(peak) != rate:
            ledger.drops(lr, f"the schedule's {peak} is the peak")
        else:
            ledger.maps(lr, {target.lr: rate}, target.phase)
    for name, ours in _PARAMETERS.get(kind, {"weight_decay": "weight_decay"}).items():
        if (key := f"{_OPT}.{name}") in ledger:
            value = (
                _betas(ledger, key) if name == "betas" else ledger.number(key, least=-1.0 if ours == "memory" else 0.0)
            )
            ledger.maps(key, {f"{OPTIMIZER}.{ours}": value})
    if (ahead := f"{_OPT}.nesterov") in ledger and kind == "sgd":
        ledger.maps(ahead, {f"{OPTIMIZER}.nesterov": ledger.flag(ahead)})
    _neutral_parameters(ledger, kind)


def _neutral_parameters(ledger: Ledger, kind: str) -> None:
    """What changes nothing, and what is left."""
    for name, value in _SAME_STEP.items():
        if (key := f"{_OPT}.{name}") in ledger and ledger.leaf(key).value == value:
            ledger.keeps(key, f"as {kind} does")
    for name in _SAME_BITS:
        if (key := f"{_OPT}.{name}") in ledger:
            ledger.keeps(key, "how a step is computed; its result is the same")
    if (mode := f"{_OPT}.adam_w_mode") in ledger:
        ledger.keeps(mode, "decay is apart from the gradient" if ledger.flag(mode) else "there is no decay")
    for leaf in ledger.waiting():
        if leaf.key.startswith(f"{_OPT}."):
            ledger.drops(leaf.name, f"{kind} has no such setting")


def _betas(ledger: Ledger, key: str) -> list[float]:
    value = ledger.leaf(key).value
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(beta, int | float) for beta in value):
        raise ledger.wrong(key, "two numbers")
    return [float(beta) for beta in value]


# --- schedule ------------------------------------------------------------------------------------------------------

_SCHEDULES: Mapping[str, tuple[str, str]] = {
    "WarmupLR": ("constant", ""),
    "WarmupDecayLR": ("linear", ""),
    "WarmupCosineLR": ("cosine", "cos_min_ratio"),
}


def _schedule(ledger: Ledger, target: Target) -> None:
    given = ledger.word("scheduler.type") if "scheduler.type" in ledger else ""
    if given and given not in _SCHEDULES:
        why = "nearest are `cosine`, `linear` and `wsd`" if given in ("OneCycle", "LRRangeTest") else "not known"
        ledger.drops("scheduler.type", f"Plait has no {given}: {why}; the recipe's schedule stays")
        for leaf in ledger.waiting():
            if leaf.key.startswith(f"{_SCHED}."):
                ledger.drops(leaf.name, f"of {given}, which is not mapped")
        return
    if given:
        settings: dict[str, Any] = {f"{SCHEDULE}.kind": _SCHEDULES[given][0]}
        notes: list[str] = []
        if not _known(ledger, f"{_SCHED}.warmup_num_steps"):
            settings[f"{SCHEDULE}.warmup"] = 1000
            notes.append("its rise is 1000 steps where nothing else is said")
        if given == "WarmupCosineLR" and not _known(ledger, f"{_SCHED}.cos_min_ratio"):
            settings[f"{SCHEDULE}.floor"] = 0.0001
            notes.append("it ends at 0.0001 of the peak")
        if not _known(ledger, f"{_SCHED}.warmup_type"):
            notes.append("DeepSpeed's rise is logarithmic where nothing else is said, Plait's is a straight line")
        ledger.maps("scheduler.type", settings, "; ".join(notes))
    _lengths(ledger, target)


def _known(ledger: Ledger, key: str) -> bool:
    """Whether a value is given, if only as ``auto``."""
    return key in ledger or any(row.leaf.name == key for row in ledger.rows)


def _lengths(ledger: Ledger, target: Target) -> None:
    if (key := f"{_SCHED}.warmup_num_steps") in ledger:
        ledger.maps(key, {f"{SCHEDULE}.warmup": ledger.integer(key)})
    if (key := f"{_SCHED}.total_num_steps") in ledger:
        ledger.maps(key, {target.steps: ledger.integer(key, least=1)}, target.phase)
    if (key := f"{_SCHED}.warmup_max_lr") in ledger:
        ledger.maps(key, {target.lr: ledger.number(key)}, target.phase)
    if (key := f"{_SCHED}.cos_min_ratio") in ledger:
        ledger.maps(key, {f"{SCHEDULE}.floor": ledger.number(key)})
    for name in ("warmup_min_lr", "warmup_min_ratio"):
        if (key := f"{_SCHED}.{name}") in ledger:
            if ledger.number(key) == 0:
                ledger.keeps(key, "the rise begins at 0")
            else:
                ledger.drops(key, "the rise begins at 0; nothing to do, it is short")
    _forms(ledger)


def _forms(ledger: Ledger) -> None:
    """What a schedule has no setting for."""
    if (key := f"{_SCHED}.warmup_type") in ledger:
        if ledger.word(key) == "linear":
            ledger.keeps(key, "the rise is a straight line")
        else:
            ledger.drops(key, "the rise is a straight line; lengthen trainer.schedule.warmup for a slower one")
    if (key := f"{_SCHED}.last_batch_iteration") in ledger:
        ledger.keeps(key, "a run that goes on takes its step from the checkpoint")
    for leaf in ledger.waiting():
        if leaf.key.startswith(f"{_SCHED}."):
            ledger.drops(leaf.name, f"{SCHEDULE} has no such setting")


# --- precision and the rest ----------------------------------------------------------------------------------------


def _precision(ledger: Ledger, target: Target) -> None:
    formats = {_FP16: "float16", "bf16.enabled": "bfloat16", "torch_autocast.enabled": ""}
    for key, given in formats.items():
        if key not in ledger:
            continue
        ledger.flag(key)  # it is on: what is off has its row already
        dtype = given
        if not dtype:
            name = "torch_autocast.dtype"
            dtype = ledger.word(name).removeprefix("torch.") if name in ledger else "bfloat16"
        if isinstance(target.spec, Tune):
            ledger.maps(key, {"dtype": dtype})
        else:
            ledger.drops(key, format_of(target))
    if "torch_autocast.dtype" in ledger:
        ledger.keeps("torch_autocast.dtype", "see torch_autocast.enabled")
    if (key := "fp16.loss_scale") in ledger:
        if ledger.number(key) == 0:
            ledger.keeps(key, "the scale of the loss adapts")
        else:
            ledger.drops(key, "the scale of the loss always adapts; nothing to do")


def format_of(target: Target) -> str:
    """Why a stage other than `tune` has no number format to set."""
    if isinstance(target.spec, Align):
        return "a model is aligned in the format in which it was tuned: set stages.tune.dtype"
    return "what learns in pretrain is float32; stages.pretrain.tower_dtype is that of frozen towers"


def _compile(ledger: Ledger) -> None:
    for key in ("compile.enabled", "compile.deepcompile"):
        if key in ledger and key == "compile.enabled" and ledger.flag(key):
            ledger.maps(key, {"trainer.compile": True})
        elif key in ledger and not ledger.flag(key):
            ledger.keeps(key, "off")


def _rest(ledger: Ledger) -> None:
    """What no setting is for: off and neutral values, then by group."""
    known = [*NEUTRAL, *NVME, *GROUPS, _BATCH.all, _BATCH.one, _BATCH.accumulated, *SECTIONS]
    for leaf in ledger.waiting():
        if leaf.name in NEUTRAL:
            values, why, otherwise = NEUTRAL[leaf.name]
            if not values or any(_same(leaf.value, value) for value in values):
                ledger.keeps(leaf.name, why)
            else:
                ledger.drops(leaf.name, otherwise)
        elif leaf.name in NVME:
            ledger.drops(leaf.name, "of offloading to a disk, which Plait does not do")
        elif group := next((name for name in GROUPS if leaf.key == name or leaf.key.startswith(f"{name}.")), None):
            ledger.drops(leaf.name, GROUPS[group])
        else:
            ledger.forgets(leaf.name, f"DeepSpeed documents no such key; {did_you_mean(leaf.key, known)}")


def _same(given: Any, value: Any) -> bool:
    """Equal, and true is not 1."""
    return given == value and isinstance(given, bool) == isinstance(value, bool)
