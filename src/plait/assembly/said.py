"""Names said aloud, as features of a frozen audio tower: what a third modality learns from, beside pictures and texts.

Test splits are said by voices that training does not hear. A name that cannot be said has no sound, and is counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from plait.assembly.audio_towers import AudioTower
from plait.assembly.pairs import Pairs, pooled
from plait.core.errors import DataError
from plait.core.events import Events
from plait.core.types import MediaRef
from plait.data.features import FeatureStore, cached_features
from plait.data.sounds import decode_sound
from plait.data.sources import JUDGED_SEED, VALIDATION
from plait.data.speech import RATE, check_voice, refusal, speak
from plait.data.spoken import STAYS, Saying


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sounds:
    """Sounds of the names of one split.

    Attributes:
        of_name: Digests of the sounds that say each name.
        unsaid: Names without a sound, by reason.
        long: Takes that were left out because they take too long, of names that have others.
    """

    of_name: Mapping[str, tuple[str, ...]]
    unsaid: Counter[str]
    long: int


def say_names(
    splits: Mapping[str, Pairs], tower: AudioTower, saying: Saying, *, cache: Path, events: Events
) -> dict[str, Pairs]:
    """The same splits, their names said aloud; the first split and that of validation in several takes, tests in one.

    Takes of validation do not depend on the seed, so that trainings with different seeds are judged by the same sounds.

    Sounds are encoded once, and kept in the cache as features.

    Args:
        splits: Pictures and names; the first is trained on.
        tower: That hears.
        saying: Voices, speeds and takes.
        cache: Folder of feature caches.
        events: Told progress, and what was not said.

    Raises:
        ConfigError: There is no such voice.
        DataError: No name of the first split can be said.
        ResourceError: The extra ``speech`` is not installed, the synthesizer fails, or the disk is full.
    """
    for voice in (*saying.voices, *saying.test_voices):
        check_voice(voice)
    made: dict[str, tuple[MediaRef, tuple[str, str, int]]] = {}  # spoken again for the encoder, not held until then
    sounds: dict[str, _Sounds] = {}
    for number, (split, pairs) in enumerate(splits.items()):
        trained = number == 0 or split == VALIDATION  # no voice of the tests is heard before them
        how = replace(saying, seed=JUDGED_SEED) if split == VALIDATION else saying
        sounds[split] = _say_all(sorted(set(pairs.names)), how, trained=trained, made=made)
        events.progress("splits said aloud", number + 1, len(splits))
    first = next(iter(splits))
    if not sounds[first].of_name:
        raise DataError(
            f"no name can be said: {_reasons(sounds[first].unsaid)}",
            place="stages.pretrain.spoken",
            remedy="take it out, or give pictures with English names",
        )
    store = cached_features(
        [ref for ref, _ in made.values()],
        read=lambda ref: _spoken(made[ref.sha256][1]),
        prepare=tower.prepare,
        encoder=tower.encoder,
        key=tower.cache_key,
        folder=cache,
        events=events,
    )
    _tell(sounds, [ref for ref, _ in made.values()], events)
    return {split: _with_sounds(pairs, sounds[split], store) for split, pairs in splits.items()}


def _say_all(
    names: Sequence[str], saying: Saying, *, trained: bool, made: dict[str, tuple[MediaRef, tuple[str, str, int]]]
) -> _Sounds:
    """Say the names of a split; what each sound is made of is put into ``made``, under its digest."""
    of_name: dict[str, tuple[str, ...]] = {}
    unsaid: Counter[str] = Counter()
    long = 0
    for name in names:
        if reason := refusal(name):
            unsaid[reason] += 1
            continue
        takes = [(name, voice, speed) for voice, speed in saying.takes_of(name, trained=trained)]
        found = {take: ref for take in takes if (ref := _say(take, most=saying.max_seconds)) is not None}
        if not found:
            unsaid["too-long"] += 1
            continue
        long += len(takes) - len(found)
        made.update({ref.sha256: (ref, take) for take, ref in found.items()})
        of_name[name] = tuple(ref.sha256 for ref in found.values())
    return _Sounds(of_name=of_name, unsaid=unsaid, long=long)


def _with_sounds(pairs: Pairs, sounds: _Sounds, store: FeatureStore) -> Pairs:
    listed = [sha256 for sha256s in sounds.of_name.values() for sha256 in sha256s]
    row = {sha256: number for number, sha256 in enumerate(listed)}
    rows = {name: tuple(row[sha256] for sha256 in sha256s) for name, sha256s in sounds.of_name.items()}
    return replace(
        pairs,
        audio=pooled(store, listed).to(pairs.text.device),
        sounds_of=tuple(rows.get(name, ()) for name in pairs.names),
    )


def _say(take: tuple[str, str, int], *, most: float) -> MediaRef | None:
    """The sound of a name by a voice at a speed, by its digest; None if it takes too long."""
    name, voice, _ = take
    data = _spoken(take)
    sound = decode_sound(data, place=name)
    if sound.seconds > most:
        return None
    sha256 = hashlib.sha256(data).hexdigest()
    return MediaRef(modality="audio", sha256=sha256, uri=f"{name!r}, {voice}", length=len(sound.samples))


def _spoken(take: tuple[str, str, int]) -> bytes:
    name, voice, speed = take
    return speak(name, voice=voice, speed=speed)


def _tell(sounds: Mapping[str, _Sounds], refs: Sequence[MediaRef], events: Events) -> None:
    unsaid = sum((one.unsaid for one in sounds.values()), Counter[str]())
    said = sum(len(one.of_name) for one in sounds.values())
    seconds = sum(ref.length for ref in refs) / RATE
    text = f"{said:,} of {said + unsaid.total():,} names said aloud: {len(refs):,} sounds of {seconds:,.0f} s"
    text += f"; not said: {_reasons(unsaid)}" if unsaid else ""
    long = sum(one.long for one in sounds.values())
    text += f"; {long:,} further takes are left out, because they take too long" if long else ""
    events.note(text, sounds=len(refs), seconds=round(seconds, 1), unsaid=dict(unsaid), long=long)


def _reasons(unsaid: Counter[str]) -> str:
    return "; ".join(f"{count:,} because {STAYS[reason]}" for reason, count in sorted(unsaid.items()))
