"""What names said aloud add to the needs of the pretrain stage, from its settings alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from plait.core.errors import ConfigError
from plait.core.estimate import Estimate, Machine, Peak, Share
from plait.core.files import read_json
from plait.data.speech import RATE
from plait.stages.pretraining.needs import checkpoints_kept
from plait.training.cost import linear_flops
from plait.training.peak import checkpoint_bytes
from plait.training.zero import zero_bytes

if TYPE_CHECKING:
    from plait.stages.pretrain import Pretrain, SpokenNames

_CONFIG, _EXTRACTOR = "config.json", "preprocessor_config.json"
AUDIO_WEIGHTS, AUDIO_WIDTH = 8_208_384, 384
_AUDIO_HZ, _SAID_S = 50, 1.2  # tokens a second of sound; seconds of a name
_SECONDS_PER_SOUND = ((0.02, 0.004), (0.06, 0.03))  # to say one twice, and to encode a second of window


def check_hearing(folder: Path, *, window_s: float) -> None:
    """See, from its files alone, that a tower hears what is said, and that a window fits it.

    Args:
        folder: Of the tower.
        window_s: Seconds it is to hear at once; 0: its own.

    Raises:
        ConfigError: It takes another rate, or has no windows.
    """
    if not (folder / _CONFIG).is_file() or not (folder / _EXTRACTOR).is_file():
        return  # the packaged one
    kind, rate = (
        read_json(folder / _CONFIG).get("model_type"),
        read_json(folder / _EXTRACTOR).get("sampling_rate", RATE),
    )
    if rate != RATE:
        raise ConfigError(
            f"the tower takes {rate:,} samples a second, names are said at {RATE:,}",
            remedy="take a tower for speech, such as whisper-tiny-en",
        )
    if window_s and kind != "whisper":
        raise ConfigError(
            f"window_s is {window_s:g}: a tower of kind {kind} hears sounds of any length",
            remedy="leave spoken.window_s out",
        )


def with_sounds(
    spec: Pretrain, spoken: SpokenNames, machine: Machine, *, found: Estimate, samples: Mapping[str, int]
) -> Estimate:
    """The same with names said aloud: sounds are encoded once, and a third head learns from their means."""
    train = samples.get("train", 0)
    sounds = train * spoken.takes + sum(samples.values()) - train
    head = (AUDIO_WIDTH + spec.d_shared) * spec.d_hidden + spec.d_hidden + spec.d_shared
    window = spoken.window_s or 30.0
    seen = min(spec.batch_size, max(train, 1)) * spec.steps_for(max(train, 1))
    state = spec.trainer.state_bytes()

    def with_head(memory: Mapping[str, int]) -> dict[str, int]:
        """The encoder's weights stand beside those of the other towers; a sound's features and samples are small."""
        states = zero_bytes(head, world=machine.processes, stage=spec.trainer.parallel.zero, bytes_state=state)
        more = {**states, "caches": 4 * sounds * AUDIO_WIDTH}
        more["weights"] += 4 * AUDIO_WEIGHTS
        if spec.trainer.async_save:  # as in peak_memory
            more["caches"] += round((4 + state) * head)
        return {part: memory.get(part, 0) + more.get(part, 0) for part in {**memory, **more}}

    def peaks(of: Estimate | Share) -> Peak:
        memory = with_head(of.memory)
        more = sum(memory.values()) - sum(of.memory.values())
        return Peak(memory=memory, moments={name: size + more for name, size in of.moments.items()})

    one = checkpoint_bytes(weights=4 * head, trainable=head, state=state)
    features = round(sounds * _SAID_S * _AUDIO_HZ) * AUDIO_WIDTH * 2
    flops = 2.0 * AUDIO_WEIGHTS * _AUDIO_HZ * window * sounds + linear_flops(head, seen, "full")
    low, high = (sounds * (once + window * second) for once, second in _SECONDS_PER_SOUND)
    return replace(
        found,
        params_trainable=found.params_trainable + head,
        params_frozen=found.params_frozen + AUDIO_WEIGHTS,
        flops=found.flops + flops,
        **peaks(found),
        shares=tuple(replace(share, **peaks(share)) for share in found.shares),
        disk_bytes=found.disk_bytes + checkpoints_kept(spec, train) * one,
        spare_bytes=found.spare_bytes + one,
        home_bytes=found.home_bytes + features,
        seconds=(found.seconds[0] + low, found.seconds[1] + high),
        notes=(
            *found.notes,
            f"at most {sounds:,} sounds of names are encoded once, windows of {window:g} s, and kept in the cache "
            f"({features / 2**20:,.0f} MiB); sizes and speeds are those of whisper-tiny-en",
        ),
    )
