"""Questions about pictures from the data stage, with the features of all pictures they are about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from plait.assembly.splits import PREFIX, splits_of
from plait.assembly.towers import ImageTower
from plait.core.errors import DataError
from plait.core.events import Events
from plait.core.tensors import Patches
from plait.core.types import MediaRef, Sample
from plait.data.augment.views import View
from plait.data.features import FeatureStore, cached_features
from plait.data.shards import ShardReader

Choice = Callable[[str, Sequence[Sample]], Sequence[Sample]]
"""Given a split's name and its questions, the ones that are wanted."""


Prepare = Callable[[Image.Image], Patches]


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Questions by split, and the features of their pictures.

    Attributes:
        samples: Questions of each split (names without the prefix), in the order of the shards.
        stores: Features by the sha256 of a picture, one store a view; the first is of the pictures as they are.
    """

    samples: Mapping[str, Sequence[Sample]]
    stores: Sequence[FeatureStore]

    def features(self, refs: Sequence[MediaRef]) -> Patches:
        """Features of pictures as they are: what an engine is given."""
        return self.stores[0]([ref.sha256 for ref in refs])


def read_questions(
    shards: Path,
    splits: Sequence[str],
    image: ImageTower,
    *,
    choose: Choice,
    cache: Path,
    events: Events,
    views: Sequence[View] = (),
) -> Questions:
    """Read questions, and encode their pictures or find them in the cache.

    Args:
        shards: Folder of the data stage.
        splits: Which splits, without prefix; the first must be there.
        image: Tower that encodes.
        choose: Which questions of a split are kept.
        cache: Folder of feature caches.
        events: Told progress.
        views: Further views of each picture of the *first* split; a cache each.

    Raises:
        DataError: The first split has no questions, the shards of a split are gone, or one is damaged.
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

        def encode(chosen: Sequence[str], prepare: Prepare, key: str) -> FeatureStore:
            refs = {ref.sha256: ref for split in chosen for sample in samples[split] for ref in sample.media()}
            return cached_features(
                list(refs.values()),
                read=reader.media,
                prepare=prepare,
                encoder=image.encoder,
                key=key,
                folder=cache,
                events=events,
            )

        stores = [encode(list(samples), image.prepare, image.cache_key)]
        for view in views:
            stores.append(encode(splits[:1], _through(view, image), view.key(image.cache_key)))
    return Questions(samples=samples, stores=stores)


def _through(view: View, image: ImageTower) -> Prepare:
    return lambda picture: image.prepare(view(picture))
