"""Megatron-LM's arguments as settings of a stage: from a script, a file of arguments, or YAML.

Arguments, their meaning and defaults: ``megatron/training/arguments.py`` of https://github.com/NVIDIA/Megatron-LM (each
is documented there by its help text); YAML: its ``examples/gpt3/gpt_config.yaml``; schedules:
``megatron/core/optimizer_param_scheduler.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.core.check import did_you_mean
from plait.core.yamltext import leaves, read_text
from plait.recipes.foreign.account import FromShell, Leaf, Ledger
from plait.recipes.foreign.deepspeed import format_of
from plait.recipes.foreign.megatron_arguments import GROUPS, LISTS, MAPPED, SAME, WHY
from plait.recipes.foreign.shell import read_arguments
from plait.recipes.foreign.target import OPTIMIZER, PARALLEL, SCHEDULE, Batch, Target, map_batch
from plait.stages.tune import Tune

_DEGREES: Mapping[str, str] = {
    "tensor_model_parallel_size": "tensor",
    "pipeline_model_parallel_size": "pipeline",
    "context_parallel_size": "context",
    "expert_model_parallel_size": "expert",
}
_STYLES: Mapping[str, str] = {
    "constant": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "inverse-square-root": "inverse-sqrt",
    "WSD": "wsd",
}
_SHARDED: Mapping[str, int] = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
_FALLS: Mapping[str, str] = {"linear": "linear", "cosine": "cosine", "minus_sqrt": "1-sqrt"}
_BATCH = Batch("global_batch_size", "micro_batch_size")
_BETAS = {"adam_beta1": 0.9, "adam_beta2": 0.999}


def read_leaves(text: str, path: Path, *, variables: Mapping[str, str] | None = None) -> list[Leaf]:
    """Every argument with its line; YAML where the file is called so.

    Raises:
        ConfigError: It is no such file.
    """
    if path.suffix not in (".yaml", ".yml"):
        return read_arguments(text, path, several=LISTS, variables=variables)
    tree = read_text(text, str(path))
    found: list[Leaf] = []
    for keys, value in leaves(tree.plain()):
        outside = keys[0] in ("ENV_VARS", "DEPENDENCIES")
        name = ".".join(keys) if outside else keys[-1].removeprefix("--").replace("-", "_")
        known = FromShell(value, "only a shell knows it") if isinstance(value, str) and "$" in value else value
        found.append(Leaf(".".join(keys), known, tree.nearest(keys)[0].source.where, name))
    return found


def read(ledger: Ledger, target: Target) -> None:
    """Give every argument its row.

    Raises:
        ConfigError: A value is not of its argument's type, or sizes contradict each other.
    """
    _tidy(ledger)
    trains = "lr" in ledger
    degrees = _parallel(ledger, target)
    kind = _optimizer(ledger, target, trains=trains)
    size = map_batch(ledger, target, _BATCH, degrees=degrees)
    _lengths(ledger, target, size)
    _schedule(ledger, target, size, trains=trains)
    _rates(ledger, target, kind, trains=trains)
    _precision(ledger, target)
    _loop(ledger)
    _rest(ledger)


def _tidy(ledger: Ledger) -> None:
    """What is not there after all."""
    for leaf in ledger.waiting():
        if isinstance(leaf.value, FromShell) and leaf.name in MAPPED:
            ledger.drops(leaf.name, f"{leaf.value.why}: give --set NAME=VALUE, or write the value into the file")
        elif leaf.value is None:
            ledger.keeps(leaf.name, "null: as if it were not given")
        elif leaf.name.startswith("ENV_VARS."):
            ledger.drops(leaf.name, "of the environment: set it in the script that calls torchrun")
        elif leaf.name.startswith("DEPENDENCIES."):
            ledger.drops(leaf.name, "of an image: docs/install.md says what Plait needs")


# --- parallel ------------------------------------------------------------------------------------------------------


def _parallel(ledger: Ledger, target: Target) -> int:
    """Map degrees; returns how many processes share one sample."""
    sharing = 1
    for name, ours in _DEGREES.items():
        if name not in ledger:
            continue
        size = ledger.integer(name, least=1)
        sharing *= 1 if ours == "expert" else size
        settings: dict[str, Any] = {f"{PARALLEL}.{ours}": size}
        if size == 1:
            ledger.keeps(name, "1 is the default")
        elif ours == "pipeline":
            other = target.at(f"{PARALLEL}.schedule") not in (None, "1f1b")
            ledger.maps(name, settings | ({f"{PARALLEL}.schedule": "1f1b"} if other else {}), "by 1F1B")
        else:
            ledger.maps(name, settings)
    if (key := "sequence_parallel") in ledger:
        if not ledger.flag(key):
            ledger.keeps(key, "false is the default")
        elif _divided(ledger, target):
            ledger.maps(key, {f"{PARALLEL}.sequence": True})
        else:
            ledger.keeps(key, "one process has all positions where one has whole matrices")
    _sharding(ledger)
    return sharing


def _divided(ledger: Ledger, target: Target) -> bool:
    """Whether processes divide matrices: by these settings, or by those of the recipe that they are put on."""
    given = [row.settings[f"{PARALLEL}.tensor"] for row in ledger.rows if f"{PARALLEL}.tensor" in row.settings]
    return (given[-1] if given else target.at(f"{PARALLEL}.tensor") or 1) > 1


def _sharding(ledger: Ledger) -> None:
    """Map what lies in pieces."""
    if "expert_tensor_parallel_size" in ledger:
        if ledger.integer("expert_tensor_parallel_size", least=1) == 1:
            ledger.keeps("expert_tensor_parallel_size", "an expert is whole in its process")
        else:
            ledger.drops("expert_tensor_parallel_size", "an expert is whole in its process; nothing to do")
    if (key := "data_parallel_sharding_strategy") in ledger:
        word = ledger.word(key)
        if word not in _SHARDED:
            raise ledger.wrong(key, ", ".join(_SHARDED))
        ledger.maps(key, {f"{PARALLEL}.zero": _SHARDED[word]})
    for key in ("use_torch_fsdp2", "use_distributed_optimizer"):
        if key in ledger and ledger.flag(key):
            zero = 3 if key == "use_torch_fsdp2" else 1
            if any(row.settings.get(f"{PARALLEL}.zero", 0) >= zero for row in ledger.rows):
                ledger.keeps(key, f"it is part of {PARALLEL}.zero, which is set above")
            else:
                ledger.maps(key, {f"{PARALLEL}.zero": zero}, f"ZeRO-{zero}")
    if (key := "optimizer_cpu_offload") in ledger and ledger.flag(key):
        ledger.maps(key, {f"{PARALLEL}.offload": True}, "weights, gradients and moments, all that is in pieces")


# --- optimizer, rates ----------------------------------------------------------------------------------------------


def _optimizer(ledger: Ledger, target: Target, *, trains: bool) -> str:
    kinds = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd", "lion": "lion", "muon": "muon", "dist_muon": "muon"}
    if "optimizer" in ledger:
        given = ledger.word("optimizer").lower()
        if given not in kinds:
            raise ledger.wrong("optimizer", ", ".join(kinds))
        why = "Adam with decay apart from the gradient" if kinds[given] == "adamw" else ""
        ledger.maps("optimizer", {f"{OPTIMIZER}.kind": kinds[given]}, why)
        return kinds[given]
    if trains and target.spec.trainer.optimizer.kind != "adamw":
        ledger.implies("--optimizer", "adam", {f"{OPTIMIZER}.kind": "adamw"})
    return "adamw" if trains else target.spec.trainer.optimizer.kind


def _rates(ledger: Ledger, target: Target, kind: str, *, trains: bool) -> None:
    betas = [ledger.number(name) if name in ledger else value for name, value in _BETAS.items()]
    for name in _BETAS:
        if name in ledger and kind in ("adamw", "muon", "lion"):
            ledger.maps(name, {f"{OPTIMIZER}.betas": betas}, "of two betas")
        elif name in ledger:
            ledger.keeps(name, f"without effect: the optimizer is {kind}")
    for name, ours, kinds in (("adam_eps", "eps", ("adamw", "muon")), ("sgd_momentum", "momentum", ("sgd",))):
        if name in ledger and kind in kinds:
            ledger.maps(name, {f"{OPTIMIZER}.{ours}": ledger.number(name)})
        elif name in ledger:
            ledger.keeps(name, f"without effect: the optimizer is {kind}")
    _decay(ledger, target, kind, trains=trains)


def _decay(ledger: Ledger, target: Target, kind: str, *, trains: bool) -> None:
    """Map decay and clipping, and what Megatron does where they are not given."""
    own = target.spec.trainer.optimizer
    if trains and kind == "sgd" and not _given(ledger, "sgd_momentum"):
        ledger.implies("--sgd-momentum", 0.9, {f"{OPTIMIZER}.momentum": 0.9})
    if "weight_decay" in ledger:
        ledger.maps("weight_decay", {f"{OPTIMIZER}.weight_decay": ledger.number("weight_decay")})
    elif trains and not _given(ledger, "weight_decay") and own.weight_decay != 0.01:
        ledger.implies("--weight-decay", 0.01, {f"{OPTIMIZER}.weight_decay": 0.01})
    for name in ("start_weight_decay", "end_weight_decay"):
        if name in ledger:
            ledger.drops(name, "decay is the same in every step; trainer.optimizer.weight_decay is it")
    if "weight_decay_incr_style" in ledger:
        if ledger.word("weight_decay_incr_style") == "constant":
            ledger.keeps("weight_decay_incr_style", "decay is the same in every step")
        else:
            ledger.drops("weight_decay_incr_style", "decay is the same in every step")
    if "clip_grad" in ledger:
        ledger.maps("clip_grad", {"trainer.clip_norm": ledger.number("clip_grad") or None})
    elif trains and not _given(ledger, "clip_grad") and target.spec.trainer.clip_norm != 1:
        ledger.implies("--clip-grad", 1.0, {"trainer.clip_norm": 1.0})


def _given(ledger: Ledger, name: str) -> bool:
    """Whether the configuration says something of it, if only what could not be mapped."""
    return name in ledger or any(row.leaf.name == name and not row.implied for row in ledger.rows)


# --- lengths and schedule ------------------------------------------------------------------------------------------


def _lengths(ledger: Ledger, target: Target, size: int | None) -> None:
    if "train_iters" in ledger:
        ledger.maps("train_iters", {target.steps: ledger.integer("train_iters", least=1)}, target.phase)
    if "train_samples" in ledger:
        steps = _steps(ledger, "train_samples", size)
        if steps:
            ledger.maps("train_samples", {target.steps: steps}, f"{size} samples a step")
        else:
            ledger.drops("train_samples", f"{target.steps} says it; global_batch_size, which divides it, is not known")


def _steps(ledger: Ledger, name: str, size: int | None) -> int | None:
    samples = ledger.integer(name)
    return math.ceil(samples / size) if size else None


def _schedule(ledger: Ledger, target: Target, size: int | None, *, trains: bool) -> None:
    """Map rate, rise and fall."""
    peak = ledger.number("lr") if trains else None
    length = next((row.settings[target.steps] for row in ledger.rows if target.steps in row.settings), None)
    style = _style(ledger, trains=trains)
    if trains:
        ledger.maps("lr", {target.lr: peak}, target.phase)
    _rise(ledger, size)
    if "min_lr" in ledger:
        least = ledger.number("min_lr")
        if not peak:
            ledger.drops("min_lr", "trainer.schedule.floor is a share of the peak, and --lr is not known")
        elif least > peak:
            raise ledger.wrong("min_lr", f"at most --lr, which is {peak:g}")
        elif style in ("constant", "inverse-sqrt") or not style:
            why = "without effect" if style == "constant" else "the schedule has no floor"
            ledger.keeps("min_lr", why) if not least or style == "constant" else ledger.drops("min_lr", why)
        else:
            ledger.maps("min_lr", {f"{SCHEDULE}.floor": least / peak}, f"as a share of {peak:g}")
    for name in ("lr_decay_iters", "lr_decay_samples"):
        if name not in ledger:
            continue
        given = ledger.integer(name) if name.endswith("iters") else _steps(ledger, name, size)
        if given is not None and given == length:
            ledger.keeps(name, "rates fall to the last step")
        else:
            ledger.drops(name, f"rates fall to the last step, which {target.steps} says")
    _fall(ledger, size)


def _style(ledger: Ledger, *, trains: bool) -> str:
    """Map the form of the fall; what it is in Plait, empty where nothing is said."""
    if "lr_decay_style" not in ledger:
        if trains and not _given(ledger, "lr_decay_style"):
            ledger.implies("--lr-decay-style", "linear", {f"{SCHEDULE}.kind": "linear"})
            return "linear"
        return ""
    given = ledger.word("lr_decay_style")
    if given not in _STYLES:
        raise ledger.wrong("lr_decay_style", ", ".join(_STYLES))
    settings: dict[str, Any] = {f"{SCHEDULE}.kind": _STYLES[given]}
    if given == "WSD" and "lr_wsd_decay_style" not in ledger:
        ledger.drops("lr_decay_style", "Megatron's fall is exponential where nothing else is said: take `wsd` by hand")
        return ""
    ledger.maps("lr_decay_style", settings)
    return _STYLES[given]


def _rise(ledger: Ledger, size: int | None) -> None:
    warmup = f"{SCHEDULE}.warmup"
    if "lr_warmup_fraction" in ledger:
        share = ledger.number("lr_warmup_fraction")
        if share >= 1:
            raise ledger.wrong("lr_warmup_fraction", "a share below 1")
        if "lr_decay_iters" in ledger:
            length = ledger.integer("lr_decay_iters")
            ledger.maps("lr_warmup_fraction", {warmup: round(share * length)}, f"of {length} steps (--lr-decay-iters)")
        else:
            ledger.maps("lr_warmup_fraction", {warmup: share}, "of all steps")
    begun = any(warmup in row.settings for row in ledger.rows)
    for name in ("lr_warmup_iters", "lr_warmup_samples"):
        if name not in ledger:
            continue
        steps = ledger.integer(name) if name.endswith("iters") else _steps(ledger, name, size)
        if steps is None:
            ledger.drops(name, "trainer.schedule.warmup says it; global_batch_size, which divides it, is not known")
        elif begun and not steps:
            ledger.keeps(name, "another key says the rise")
        else:
            ledger.maps(name, {warmup: steps}, "" if name.endswith("iters") else f"{size} samples a step")
            begun = True
    if "lr_warmup_init" in ledger:
        if ledger.number("lr_warmup_init") == 0:
            ledger.keeps("lr_warmup_init", "the rise begins at 0")
        else:
            ledger.drops("lr_warmup_init", "the rise begins at 0; nothing to do, it is short")


def _fall(ledger: Ledger, size: int | None) -> None:
    """The end of `wsd`."""
    wsd = any(row.settings.get(f"{SCHEDULE}.kind") == "wsd" for row in ledger.rows)
    for name in ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"):
        if name not in ledger:
            continue
        if not wsd:
            ledger.keeps(name, "without effect: the schedule is not WSD")
        elif name.endswith("style"):
            form = ledger.word(name)
            if form in _FALLS:
                ledger.maps(name, {f"{SCHEDULE}.form": _FALLS[form]})
            else:
                ledger.drops(name, "trainer.schedule.form is 1-sqrt, linear or cosine; 1-sqrt stays")
        else:
            steps = ledger.integer(name) if name.endswith("iters") else _steps(ledger, name, size)
            if steps:
                ledger.maps(name, {f"{SCHEDULE}.fall": steps})
            else:
                ledger.drops(name, "trainer.schedule.fall says it; global_batch_size, which divides it, is not known")


# --- precision, memory, files --------------------------------------------------------------------------------------


def _precision(ledger: Ledger, target: Target) -> None:
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if name not in ledger:
            continue
        if not ledger.flag(name):
            ledger.keeps(name, "off")
        elif isinstance(target.spec, Tune):
            ledger.maps(name, {"dtype": dtype})
        else:
            ledger.drops(name, format_of(target))


def _loop(ledger: Ledger) -> None:
    if "recompute_granularity" in ledger:
        word = ledger.word("recompute_granularity")
        if word not in ("full", "selective"):
            raise ledger.wrong("recompute_granularity", "full or selective")
        _recompute(ledger, "recompute_granularity", word)
    if "recompute_activations" in ledger and ledger.flag("recompute_activations"):
        _recompute(ledger, "recompute_activations", "selective")
    if "save_interval" in ledger:
        ledger.maps("save_interval", {"save_every": ledger.integer("save_interval", least=1)})
    if "seed" in ledger:
        ledger.maps("seed", {"seed": ledger.integer("seed")})
    if "num_workers" in ledger:
        ledger.maps("num_workers", {"trainer.workers": ledger.integer("num_workers")}, "of each training process")
    if "async_save" in ledger and ledger.flag("async_save"):
        ledger.maps("async_save", {"trainer.async_save": True})


def _recompute(ledger: Ledger, name: str, word: str) -> None:
    why = "keeps wide matrix products and fused attention, and computes the rest again" if word == "selective" else ""
    ledger.maps(name, {"trainer.recompute": word}, why)


def _rest(ledger: Ledger) -> None:
    """What no setting is for."""
    for leaf in ledger.waiting():
        group = next((group for group, names in GROUPS.items() if leaf.name in names), None)
        if leaf.name in SAME:
            ledger.keeps(leaf.name, SAME[leaf.name])
        elif leaf.value is False and (group or leaf.name in MAPPED):
            ledger.keeps(leaf.name, "off")
        elif group is not None:
            ledger.drops(leaf.name, WHY[group])
        else:
            known = [*MAPPED, *SAME, *(name for names in GROUPS.values() for name in names)]
            near = did_you_mean(leaf.name, known)
            ledger.forgets(leaf.name, f"no argument of Megatron-LM that Plait knows; {near}")
