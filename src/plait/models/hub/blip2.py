"""BLIP-2's model for retrieval in Hugging Face's layout (``Blip2ForImageTextRetrieval``) and our first stage.

Its vision tower is not ours and goes its own way. The head that writes text is not in that layout: it is ours alone.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from plait.models.hub import qformer
from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed

RULES = (
    Rule(ours="contrast.image", theirs=("vision_projection",)),
    Rule(ours="contrast.text", theirs=("text_projection",)),
    Rule(ours="matching.judge", theirs=("itm_head",)),
)
_TOWER, _OWN = "vision_model.", "qformer."
_OURS_ALONE = ("writing.", "log_scale", "tower.")


class Parts(NamedTuple):
    """Weights of the Q-Former and its heads under our names, and those of the vision tower as they were."""

    stage: dict[str, Tensor]
    tower: dict[str, Tensor]


def to_ours(state: Mapping[str, Tensor], *, place: str = "") -> Parts:
    """Weights of a file; what :class:`~plait.models.blip2.Blip2Stage1` has beyond them is not in it.

    Raises:
        CheckpointError: Names have no place here.
    """
    tower = {name: value for name, value in state.items() if name.startswith(_TOWER)}
    heads = {name: value for name, value in state.items() if name.startswith(tuple(r.theirs[0] + "." for r in RULES))}
    rest = {name: value for name, value in state.items() if name not in tower and name not in heads}
    found = {f"{_OWN}{name}": value for name, value in qformer.to_ours(rest, place=place).items()}
    return Parts(found | renamed(heads, RULES, place=place), tower)


def to_official(state: Mapping[str, Tensor], tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of a file, with those of the tower.

    The head that writes and the temperature have no place there and are left out.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    known = {name: value for name, value in state.items() if not name.startswith(_OURS_ALONE)}
    own = {name.removeprefix(_OWN): value for name, value in known.items() if name.startswith(_OWN)}
    heads = {name: value for name, value in known.items() if not name.startswith(_OWN)}
    return {**tower, **qformer.to_official(own), **to_theirs(heads, RULES, place="Blip2Stage1")}
