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
from plait.assembly.text_scratch import RawTokens
from plait.assembly.towers import ImageTower
from plait.core.errors import DataError
from plait.core.events import Events
from plait.core.types import Sample
from plait.data.features import FeatureStore, cached_features
from plait.data.pair_batches import StoredPixels, StoredTokens
from plait.data.shards import ShardReader
from plait.models.dual import pool

_TEXTS = 256
_ITEMS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """Named pictures of one split.

    Attributes:
        ids: Sample id of each pair.
        names: The name of each picture.
        concepts: Its concept.
        uris: Where its bytes are, in the shard folder.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    concepts: tuple[str, ...]
    uris: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs(Named):
    """One split, as features.

    Attributes:
        image: Pooled features of the pictures; their pixels, read when asked for, where the tower learns.
        text: Features of all texts of the split; their token ids, where the tower learns.
        texts_of: Rows of ``text`` that may stand for each pair; the first is its name.
        classes: Number of the concept.
        audio: Features of names said aloud, where that was asked for.
        sounds_of: Rows of ``audio`` for each pair; none for a name that cannot be said.
    """

    image: Float[Tensor, "pair d"] | StoredPixels
    text: Float[Tensor, "text e"] | StoredTokens
    texts_of: tuple[tuple[int, ...], ...]
    classes: Int[Tensor, " pair"]
    audio: Float[Tensor, "sound f"] | None = None
    sounds_of: tuple[tuple[int, ...], ...] = ()


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
    samples, store = read_pictures(shards, splits, dual.image, cache=cache, events=events)
    return {
        split: _encode(listed, store, dual, keywords=keywords and split == splits[0], events=events)
        for split, listed in samples.items()
    }


def read_pictures(
    shards: Path, splits: Sequence[str], image: ImageTower, *, cache: Path, events: Events
) -> tuple[dict[str, list[Sample]], FeatureStore]:
    """Samples of the splits that are there, and features of all their pictures.

    Args:
        shards: Folder of the data stage; must have the first of the splits.
        splits: Names, in order.
        image: Tower that encodes.
        cache: Folder of feature caches.
        events: Told progress.

    Raises:
        DataError: The first split is missing, or one that the data stage made; or a shard is damaged.
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
            prepare=image.prepare,
            encoder=image.encoder,
            key=image.cache_key,
            folder=cache,
            events=events,
        )
    return samples, store


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts(Named):
    """Which texts may stand for the pictures of a split.

    Attributes:
        sha256s: Of each picture.
        texts: All texts of the split, sorted.
        texts_of: Which of them may stand for each picture; the first is its name.
        classes: Number of each picture's concept.
    """

    sha256s: tuple[str, ...]
    texts: tuple[str, ...]
    texts_of: tuple[tuple[int, ...], ...]
    classes: tuple[int, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample], *, keywords: bool) -> "Texts":
        """Texts of a split.

        Args:
            samples: Of the split.
            keywords: Other English words for a concept may stand for it, too.

        Raises:
            DataError: A picture has no name.
        """
        names = tuple(_name(sample) for sample in samples)
        lists = [
            (name, *(_keywords(sample, name) if keywords else ())) for sample, name in zip(samples, names, strict=True)
        ]
        texts = tuple(sorted({text for listed in lists for text in listed}))
        row: Mapping[str, int] = {text: number for number, text in enumerate(texts)}
        concepts = tuple(str(sample.meta.get("concept") or sample.id) for sample in samples)
        number = {concept: i for i, concept in enumerate(sorted(set(concepts)))}
        return cls(
            ids=tuple(sample.id for sample in samples),
            names=names,
            concepts=concepts,
            uris=tuple(sample.media()[0].uri for sample in samples),
            sha256s=tuple(sample.media()[0].sha256 for sample in samples),
            texts=texts,
            texts_of=tuple(tuple(row[text] for text in listed) for listed in lists),
            classes=tuple(number[concept] for concept in concepts),
        )

    def check_lengths(self, counts: Sequence[int], *, most: int) -> None:
        """See that no text is too long.

        Args:
            counts: Tokens of each text.
            most: That there may be.

        Raises:
            DataError: One is longer; names its sample, the length, and how many there are.
        """
        long = {number: count for number, count in enumerate(counts) if count > most}
        for sample, listed in zip(self.ids, self.texts_of, strict=True):
            for number in listed:
                if number in long:
                    raise DataError(
                        f"{len(long)} of {len(self.texts)} texts are longer than {most} tokens; "
                        f"the first has {long[number]}: {self.texts[number][:60]!r}",
                        place=f"sample {sample}",
                        remedy="shorten or leave out those texts, or raise stages.pretrain.max_tokens",
                    )


def _encode(samples: Sequence[Sample], store: FeatureStore, dual: Dual, *, keywords: bool, events: Events) -> Pairs:
    found = Texts.of(samples, keywords=keywords)
    encoder = dual.text.encoder
    found.check_lengths(encoder.count_tokens(found.texts), most=encoder.max_tokens)
    device = dual.model.log_scale.device
    return Pairs(
        ids=found.ids,
        names=found.names,
        concepts=found.concepts,
        uris=found.uris,
        image=_pictures(store, found.sha256s, dual),
        text=_texts(found.texts, dual, events),
        texts_of=found.texts_of,
        classes=torch.tensor(found.classes, dtype=torch.long, device=device),
    )


def _pictures(store: FeatureStore, sha256s: tuple[str, ...], dual: Dual) -> Float[Tensor, "pair d"] | StoredPixels:
    device = dual.model.log_scale.device
    if dual.model.tower is not None:
        return StoredPixels(store=store, sha256s=sha256s, device=device)
    return pooled(store, sha256s).to(device)


def pooled(store: FeatureStore, sha256s: Sequence[str]) -> Float[Tensor, "item d"]:
    """The mean of the features of each item, in float32."""
    parts: list[Tensor] = []
    for at in range(0, len(sha256s), _ITEMS):  # the maps of a few at a time: only their means stay in memory
        media = store.one_each(sha256s[at : at + _ITEMS])
        parts.append(pool(type(media)(values=media.values.float(), grid=media.grid)))
    return torch.cat(parts) if parts else torch.zeros(0, store.d_out)


def _texts(texts: Sequence[str], dual: Dual, events: Events) -> Float[Tensor, "text e"] | StoredTokens:
    encoder, device = dual.text.encoder, dual.model.log_scale.device
    if isinstance(encoder, RawTokens):
        return StoredTokens(ids=encoder.words.ids(texts), device=device)
    parts: list[Tensor] = []
    for at in range(0, len(texts), _TEXTS):
        with torch.inference_mode():
            parts.append(encoder(texts[at : at + _TEXTS]).float().clone())
        events.progress("texts", min(at + _TEXTS, len(texts)), len(texts))
    # Cloned outside inference mode: inference tensors cannot be saved for backward.
    found = torch.cat(parts).clone() if parts else torch.zeros(0, encoder.d_out)
    return found.to(device)


def _name(sample: Sample) -> str:
    name = sample.answer("name.en")
    if not name:
        raise DataError("the picture has no name.en", place=sample.id, remedy="run the data stage again")
    return name


def _keywords(sample: Sample, name: str) -> list[str]:
    """Other words for the concept: each alone, and all after the name."""
    listed = sample.answer("keywords.en")
    return [f"{name}, {listed}", *listed.split(", ")] if listed else []
