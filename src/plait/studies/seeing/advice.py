"""What the rules of ``plait advise encoder`` would take of the four encoders."""

from collections.abc import Mapping
from functools import cache

import torch

from plait.models.advise import Candidate, Family, Judged, Need, Task, ranked
from plait.studies.encoders import ENCODERS, EncoderName
from plait.studies.seeing.scenes import SIDE
from plait.studies.seeing.towers import maps, tower

_FAMILIES: Mapping[EncoderName, Family] = {
    "cnn": "convolutions",
    "vit": "attention",
    "swin": "attention",
    "hybrid": "both",
}


@cache
def advised(task: Task, pictures: int) -> EncoderName:
    """The first by the rules, for encoders from scratch that cost alike and have no published accuracy.

    Args:
        task: Marks are ``dense``, all else is ``classify``.
        pictures: That there are to train on.

    Example:
        >>> advised("classify", 1000)
        'cnn'
    """
    found: list[Judged] = []
    for name in ENCODERS:
        with torch.device("meta"):
            scales = len({part.shape[2:] for part in maps(tower(name), torch.zeros(2, 3, SIDE, SIDE))})
        candidate = Candidate(name=name, settings={}, build=lambda name=name: tower(name), family=_FAMILIES[name])
        found.append(Judged(candidate=candidate, scales=scales))
    first = ranked(found, Need(size=SIDE, task=task, train_pictures=pictures))[0].candidate.name
    return next(name for name in ENCODERS if name == first)
