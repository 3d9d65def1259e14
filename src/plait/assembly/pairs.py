"""Splits of the data stage as features of frozen towers, or as pixels for a tower that learns."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.assembly.dual import Dual
from plait.assembly.splits import splits_of
from plait.core.errors import DataError
from plait.core.events import Events
from plait.core.types import Sample
from plait.data.features import FeatureStore, cached_features
from plait.data.pair_batches import StoredPixels
from plait.data.shards import ShardReader
from plait.models.dual import pool
from plait.models.towers.text import TextTower

_TEXTS = 256
_ITEMS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """One split.

    Attributes:
        ids: Sample id of each pair.
        names: The name of each picture.
        concepts: Its concept.
        uris: Where its bytes are, in the shard folder.
        image: Pooled features of the pictures; their pixels, read when asked for, where the tower learns.
        text: Features of all texts of the split.
        texts_of: Rows of ``text`` that may stand for each pair; the first is its name.
        classes: Number of the concept.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    concepts: tuple[str, ...]
    uris: tuple[str, ...]
    image: Float[Tensor, "pair d"] | StoredPixels
    text: Float[Tensor, "text e"]
    texts_of: tuple[tuple[int, ...], ...]
    classes: Int[Tensor, " pair"]


def read_pairs(
    shards: Path, splits: Sequence[str], dual: Dual, *, cache: Path, keywords: bool, events: Events
) -> dict[str, Pairs]:
    """Read the splits that are there and encode their pictures and names; features of pictures come from the cache.

    Args:
        shards: Folder of the data stage; must have the first of the splits.
        splits: Names, in order.
        dual: Whose towers encode, and on whose device the features come.
        cache: Folder of feature caches.
        keywords: Encode other English words for each concept too, for the first split.
        events: Told progress.

    Raises:
        DataError: The first split is missing, or one that the data stage made; a shard is damaged, a picture has no
            name, or a name is too long.
        ResourceError: The disk is full.
    """
    there = splits_of(shards)
    samples: dict[str, list[Sample]] = {}
    holder: dict[str, ShardReader] = {}
    with ExitStack() as stack:
        for split in splits:
            if split in there or split == splits[0]:
                reader = stack.enter_context(ShardReader(shards, split))
                samples[split] = list(reader)
                for sample in samples[split]:
                    holder.setdefault(sample.media()[0].sha256, reader)
        store = cached_features(
            [sample.media()[0] for listed in samples.values() for sample in listed],
            read=lambda ref: holder[ref.sha256].media(ref),
            prepare=dual.image.prepare,
            encoder=dual.image.encoder,
            key=dual.image.cache_key,
            folder=cache,
            events=events,
        )
    return {
        split: _encode(listed, store, dual, keywords=keywords and split == splits[0], events=events)
        for split, listed in samples.items()
    }


def _encode(samples: Sequence[Sample], store: FeatureStore, dual: Dual, *, keywords: bool, events: Events) -> Pairs:
    names = tuple(_name(sample) for sample in samples)
    lists = [
        (name, *(_keywords(sample, name) if keywords else ())) for sample, name in zip(samples, names, strict=True)
    ]
    texts = sorted({text for listed in lists for text in listed})
    _check_length(samples, lists, texts, encoder=dual.text.encoder)
    row: Mapping[str, int] = {text: number for number, text in enumerate(texts)}
    concepts = tuple(str(sample.meta.get("concept") or sample.id) for sample in samples)
    number = {concept: i for i, concept in enumerate(sorted(set(concepts)))}
    device = dual.model.log_scale.device
    return Pairs(
        ids=tuple(sample.id for sample in samples),
        names=names,
        concepts=concepts,
        uris=tuple(sample.media()[0].uri for sample in samples),
        image=_pictures(store, tuple(sample.media()[0].sha256 for sample in samples), dual),
        text=_texts(texts, dual, events).to(device),
        texts_of=tuple(tuple(row[text] for text in listed) for listed in lists),
        classes=torch.tensor([number[concept] for concept in concepts], dtype=torch.long, device=device),
    )


def _check_length(
    samples: Sequence[Sample], lists: Sequence[Sequence[str]], texts: Sequence[str], *, encoder: TextTower
) -> None:
    most = encoder.max_tokens
    counts = zip(texts, encoder.count_tokens(texts), strict=True)
    long = {text: count for text, count in counts if count > most}
    for sample, listed in zip(samples, lists, strict=True):
        for text in listed:
            if text in long:
                raise DataError(
                    f"{len(long)} of {len(texts)} texts are longer than {most} tokens; "
                    f"the first has {long[text]}: {text[:60]!r}",
                    place=f"sample {sample.id}",
                    remedy="shorten or leave out those texts, or raise stages.pretrain.max_tokens",
                )


def _pictures(store: FeatureStore, sha256s: tuple[str, ...], dual: Dual) -> Float[Tensor, "pair d"] | StoredPixels:
    device = dual.model.log_scale.device
    if dual.model.tower is not None:
        return StoredPixels(store=store, sha256s=sha256s, device=device)
    return _pooled(store, sha256s).to(device)


def _pooled(store: FeatureStore, sha256s: Sequence[str]) -> Float[Tensor, "pair d"]:
    parts: list[Tensor] = []
    for at in range(0, len(sha256s), _ITEMS):  # the maps of a few at a time: only their means stay in memory
        media = store.one_each(sha256s[at : at + _ITEMS])
        parts.append(pool(type(media)(values=media.values.float(), grid=media.grid)))
    return torch.cat(parts) if parts else torch.zeros(0, store.d_out)


def _texts(texts: Sequence[str], dual: Dual, events: Events) -> Float[Tensor, "text e"]:
    parts: list[Tensor] = []
    for at in range(0, len(texts), _TEXTS):
        with torch.inference_mode():
            parts.append(dual.text.encoder(texts[at : at + _TEXTS]).float().clone())
        events.progress("texts", min(at + _TEXTS, len(texts)), len(texts))
    # Cloned outside inference mode: inference tensors cannot be saved for backward.
    return torch.cat(parts).clone() if parts else torch.zeros(0, dual.text.encoder.d_out)


def _name(sample: Sample) -> str:
    name = sample.answer("name.en")
    if not name:
        raise DataError("the picture has no name.en", place=sample.id, remedy="run the data stage again")
    return name


def _keywords(sample: Sample, name: str) -> list[str]:
    """Other words for the concept: each alone, and all after the name."""
    listed = sample.answer("keywords.en")
    return [f"{name}, {listed}", *listed.split(", ")] if listed else []
