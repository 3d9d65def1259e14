"""What a weight is in its model: of a normalization layer, an embedding, or so many layers below the top."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_STACKS = frozenset({"layers", "layer", "blocks", "block", "h", "stages", "stage", "resblocks", "parts"})
"""What lists of layers are called, here and in transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Roles of the weights of one model, by name.

    Attributes:
        norms: Weights of normalization layers, whatever their shape.
        embeddings: Tables that are looked up, and the heads over a vocabulary.
        above: How many layers lie above a weight: ``L - l``. 0 is not listed: the top of a stack of layers, and all
            that belongs to none.
    """

    norms: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    above: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> Roles:
        """Roles of all weights of a module."""
        return cls(norms=norm_weights(module), embeddings=embedding_weights(module), above=layers_above(module))

    def under(self, prefix: str) -> Roles:
        """The same with names that begin with ``prefix``."""
        return Roles(
            norms=frozenset(prefix + name for name in self.norms),
            embeddings=frozenset(prefix + name for name in self.embeddings),
            above={prefix + name: count for name, count in self.above.items()},
        )

    def __or__(self, other: Roles) -> Roles:
        """Roles of two models whose names differ."""
        return Roles(
            norms=self.norms | other.norms,
            embeddings=self.embeddings | other.embeddings,
            above={**self.above, **other.above},
        )


def norm_weights(module: nn.Module) -> frozenset[str]:
    """Names of weights in normalization layers: any class called ``*Norm`` or ``*Norm2d``, whoever wrote it."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, owner in module.named_modules()
        if re.search(r"Norm(\dd)?$", type(owner).__name__)
        for name, _ in owner.named_parameters(recurse=False)
    )


def embedding_weights(module: nn.Module) -> frozenset[str]:
    """Names of tables that are looked up, and of output heads that a model of transformers names as such."""
    from torch import nn

    tables = [owner.weight for owner in module.modules() if isinstance(owner, nn.Embedding)]
    for owner in module.modules():
        head = getattr(owner, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Linear):
            tables.append(head.weight)
    known = {id(table) for table in tables}
    return frozenset(name for name, weight in module.named_parameters() if id(weight) in known)


def layers_above(module: nn.Module) -> dict[str, int]:
    """How many layers lie above each weight, where that is more than 0.

    A stack is a list of layers under one of the usual names; a list inside a list, or inside a class called ``*Stage``,
    is counted through. In a stack of ``n`` layers, those above layer ``i`` (from 0) are ``n - i``, since what follows
    the stack (norm, head) is one more. What its owner registers before the stack (embeddings, a stem) has ``n + 1``.

    Bao et al., "BEiT" (arXiv 2106.08254) and Clark et al., "ELECTRA" (arXiv 2003.10555) count so.
    """
    names = [name for name, _ in module.named_parameters(remove_duplicate=True)]
    stacks = list(_stacks(module))
    found: dict[str, int] = {}
    for path in stacks:
        units = list(_units(module.get_submodule(path), path))
        inside = [name for name in names if _below(name, path)]
        if len(units) < 2 or not inside:
            continue
        number = 0
        for name in inside:  # what lies between two layers, such as a merging of cells, goes with the one before it
            number = next((i for i, unit in enumerate(units) if _below(name, unit)), number)
            found[name] = len(units) - number
        others = [other for other in stacks if other != path]
        before = _before(names, path, others=others)
        found |= {name: len(units) + 1 for name in before}
    return found


def _stacks(module: nn.Module) -> Iterator[str]:
    """Paths of the outermost lists of layers."""
    from torch import nn

    seen: list[str] = []
    for path, owner in module.named_modules():
        named = path.rpartition(".")[2] in _STACKS and isinstance(owner, nn.ModuleList | nn.Sequential)
        if named and not any(_below(path, outer) for outer in seen):
            seen.append(path)
            yield path


def _units(stack: nn.Module, path: str) -> Iterator[str]:
    """Paths of the layers of a stack, in order."""
    from torch import nn

    for name, child in stack.named_children():
        here = f"{path}.{name}"
        if next(child.children(), None) is None or next(child.parameters(), None) is None:
            continue  # a single operation is no layer of a model: lists of these are heads
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from list(_units(child, here)) or [here]
            continue
        inner = [
            (n, c) for n, c in child.named_children() if n in _STACKS and isinstance(c, nn.ModuleList | nn.Sequential)
        ]
        if type(child).__name__.endswith("Stage") and inner:
            for n, c in inner:
                yield from _units(c, f"{here}.{n}")
        else:
            yield here


def _before(names: list[str], stack: str, *, others: list[str]) -> list[str]:
    """What comes before a stack in the nearest owner that registers anything before it and holds no other stack."""
    first = next(i for i, name in enumerate(names) if _below(name, stack))
    root = stack
    while root:
        root = root.rpartition(".")[0]
        if any(not root or _below(other, root) for other in others):
            return []
        if found := [name for name in names[:first] if not root or _below(name, root)]:
            return found
    return []


def _below(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")
