"""Questions about pictures from the data stage, with the features of all pictures they are about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.assembly.audio_towers import AudioTower
from plait.assembly.splits import PREFIX, splits_of
from plait.assembly.towers import ImageTower
from plait.core.errors import DataError
from plait.core.events import Events
from plait.core.tensors import Patches
from plait.core.types import MediaRef, Modality, Sample
from plait.data.augment.views import View
from plait.data.features import FeatureStore, FreshFeatures, cached_features
from plait.data.shards import ShardReader

Choice = Callable[[str, Sequence[Sample]], Sequence[Sample]]
"""Given a split's name and its questions, the ones that are wanted."""


Prepare = Callable[[Any], Patches]


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Questions by split, and the features of their pictures.

    Attributes:
        samples: Questions of each split (names without the prefix), in the order of the shards.
        stores: Features by the sha256 of a picture, one store a view; the first is of the pictures as they are.
        others: Features of what is no picture, by modality.
    """

    samples: Mapping[str, Sequence[Sample]]
    stores: Sequence[FeatureStore]
    others: Mapping[Modality, FeatureStore] = field(default_factory=dict[Modality, FeatureStore])

    def features(self, refs: Sequence[MediaRef]) -> Patches:
        """Features of pictures as they are, or of sounds: what an engine is given.

        Args:
            refs: Of one modality.
        """
        store = self.others.get(refs[0].modality, self.stores[0]) if refs else self.stores[0]
        return store([ref.sha256 for ref in refs])


def read_questions(
    shards: Path,
    splits: Sequence[str],
    image: ImageTower,
    *,
    choose: Choice,
    cache: Path | None,
    events: Events,
    views: Sequence[View] = (),
    audio: AudioTower | None = None,
) -> Questions:
    """Read questions, and encode their pictures and sounds or find them in the cache.

    Args:
        shards: Folder of the data stage.
        splits: Which splits, without prefix; the first must be there.
        image: Tower that encodes.
        choose: Which questions of a split are kept.
        cache: Folder of feature caches; None encodes anew whenever features are asked for.
        events: Told progress.
        views: Further views of each picture of the *first* split; a cache each.
        audio: Tower that encodes sounds.

    Raises:
        DataError: The first split has no questions, the shards of a split are gone, one is damaged, or there are sounds
            and no tower for them.
        ResourceError: The disk is full.
    """
    there = splits_of(shards, prefix=PREFIX)
    samples: dict[str, Sequence[Sample]] = {}
    with ShardReader(shards, PREFIX + splits[0]) as reader:
        for split in splits:
            if split in there or split == splits[0]:
                with ShardReader(shards, PREFIX + split) as asked:
                    samples[split] = choose(split, list(asked))
        if not samples[splits[0]]:
            raise DataError(
                f"no question of {splits[0]!r} is left",
                place=str(shards),
                remedy="ask for tasks that the data stage made (its card lists them)",
            )

        refs = {s: {ref.sha256: ref for sample in listed for ref in sample.media()} for s, listed in samples.items()}
        shown = _of("image", refs.values())
        heard = _of("audio", refs.values())
        if heard and audio is None:
            raise DataError(
                f"{len(heard):,} sounds, and no tower that hears them",
                place=f"{shards}/{heard[0].uri}",
                remedy="name an audio tower, or make the data stage again without questions.spoken",
            )

        def encode(
            tower: ImageTower | AudioTower, media: Sequence[MediaRef], *, prepare: Prepare, key: str
        ) -> FeatureStore:
            if cache is None:
                again = ShardReader(shards, PREFIX + splits[0])  # open as long as features are asked for
                return FreshFeatures(media, read=again.media, prepare=prepare, encoder=tower.encoder)
            return cached_features(
                media,
                read=reader.media,
                prepare=prepare,
                encoder=tower.encoder,
                key=key,
                folder=cache,
                events=events,
            )

        stores = [encode(image, shown, prepare=image.prepare, key=image.cache_key)]
        of_first = _of("image", [refs[splits[0]]]) if views else []
        for view in views:
            stores.append(encode(image, of_first, prepare=_through(view, image), key=view.key(image.cache_key)))
        others: dict[Modality, FeatureStore] = {}
        if audio is not None and heard:
            others["audio"] = encode(audio, heard, prepare=audio.prepare, key=audio.cache_key)
    return Questions(samples=samples, stores=stores, others=others)


def _of(modality: Modality, refs: Iterable[Mapping[str, MediaRef]]) -> list[MediaRef]:
    """What is of this modality, once each, in the order in which it is first shown."""
    first = {sha256: ref for split in refs for sha256, ref in split.items()}
    return [ref for ref in first.values() if ref.modality == modality]


def _through(view: View, image: ImageTower) -> Prepare:
    return lambda picture: image.prepare(view(picture))
