"""LLaVA's layout of files (``LlavaForConditionalGeneration``, arXiv 2304.08485, 2310.03744) and our compositions.

Tower and decoder keep their own names under a word of LLaVA's; the projector has two layers. A connector of one layer
is written as the first of them, with a second that changes nothing and no activation between
(``projector_hidden_act`` is ``linear``).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed

PROJECTOR = (
    Rule(ours="connectors.image.up", theirs=("multi_modal_projector.linear_1",)),
    Rule(ours="connectors.image.down", theirs=("multi_modal_projector.linear_2",)),
)
PARTS = {"encoders.image.backbone.": "vision_tower.", "decoder.": "language_model."}
"""Our names of what keeps its own names, and LLaVA's."""

_OURS_ALONE = ("encoders.image.normalize.",)
# What LLaVA leaves to its processor.
_LINEAR = "connectors.image.linear."


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model (``MultimodalLM``, its adapters merged) under the names of a file.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    found: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, value in state.items():
        ours = next((part for part in PARTS if name.startswith(part)), None)
        if ours is not None:
            found[PARTS[ours] + name.removeprefix(ours)] = value
        elif name.startswith(_LINEAR):
            rest[name.replace(".linear.", ".up.")] = value
            # The second layer of two: one on the diagonal, zeros beside it and in the bias.
            same = torch.eye(len(value)) if value.ndim == 2 else torch.zeros(len(value))
            rest[name.replace(".linear.", ".down.")] = same.to(value.dtype)
        elif not name.startswith(_OURS_ALONE):
            rest[name] = value
    return found | to_theirs(rest, PROJECTOR, place="MultimodalLM")


def projector_to_ours(state: Mapping[str, Tensor], *, act: str, place: str = "") -> dict[str, Tensor]:
    """Weights of a projector (``multi_modal_projector.…``) under the names of our connector.

    Args:
        state: Biases may be missing: they are zeros then.
        act: ``gelu`` gives an ``Mlp``; ``linear`` a ``Linear``, the two layers folded into one.
        place: File or folder, for errors.

    Raises:
        CheckpointError: Names have no place here.
    """
    found = renamed(state, PROJECTOR, place=place)
    up, down = (found[f"connectors.image.{part}.weight"] for part in ("up", "down"))
    first, second = (
        found.get(f"connectors.image.{part}.bias", weight.new_zeros(len(weight)))
        for part, weight in (("up", up), ("down", down))
    )
    if act == "linear":
        wide = down.float()
        return {
            f"{_LINEAR}weight": (wide @ up.float()).to(up.dtype),
            f"{_LINEAR}bias": (wide @ first.float() + second.float()).to(up.dtype),
        }
    return found | {"connectors.image.up.bias": first, "connectors.image.down.bias": second}
