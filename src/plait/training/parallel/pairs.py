"""The matrices of a language model that processes divide in pairs: which part each holds, and how it computes on it.

Shoeybi et al., Megatron-LM, https://arxiv.org/abs/1909.08053, section 3. Which matrix is cut how says :mod:`.tensor`.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn import functional

from plait.core import dtensors, mesh

OF_HEADS = "replicated_with_grad_allreduce"
"""What transformers calls a module that works on each head: of its gradient, a process has the part of its own."""


def place(module: nn.Module, name: str, ranks: DeviceMesh, *, placement: Placement) -> None:
    """Leave this process its part of a weight, in place."""
    weight = module.get_parameter(name)
    cut = nn.Parameter(distribute_tensor(weight.detach(), ranks, [placement]), requires_grad=weight.requires_grad)
    module.register_parameter(name, cut)


class Pairs:
    """The cut matrices of a language model, of which each process computes its part.

    Args:
        ranks: The processes.
    """

    def __init__(self, ranks: DeviceMesh) -> None:
        self.ranks = ranks
        self._asked: dict[int, tuple[Tensor, Tensor]] = {}

    def cut(self, module: nn.Module, how: str) -> None:
        """Cut the weights of one module, and let it compute on this process's part of them."""
        if how == OF_HEADS:
            module.__dict__["forward"] = partial(self.of_heads, module, module.forward)
            return
        assert isinstance(module, nn.Linear)
        columns = how == "colwise"
        place(module, "weight", self.ranks, placement=Shard(0) if columns else Shard(1))
        if module.bias is not None:
            place(module, "bias", self.ranks, placement=Shard(0) if columns else Replicate())
        module.__dict__["forward"] = partial(self.columns if columns else self.rows, module)

    def columns(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """This process's outputs of a linear layer."""
        bias = None if linear.bias is None else dtensors.local(linear.bias)
        return functional.linear(self._shared(x), dtensors.local(linear.weight), bias)

    def rows(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """All outputs of a linear layer of which each process has its inputs: the sum over the processes."""
        self._asked.clear()
        part = DTensor.from_local(functional.linear(x, dtensors.local(linear.weight)), self.ranks, [Partial()])
        with mesh.explained():
            found = part.redistribute(placements=[Replicate()]).to_local()
        return found if linear.bias is None else found + dtensors.local(linear.bias)

    def words(self, table: nn.Embedding, ids: Tensor) -> Tensor:
        """Rows of a table of which each process has its own: the sum over the processes."""
        own = dtensors.local(table.weight)
        first = self.ranks.get_local_rank() * -(-len(table.weight) // self.ranks.size())
        here = (ids >= first) & (ids < first + len(own))
        padding = None if table.padding_idx is None else table.padding_idx - first
        padding = padding if padding is not None and 0 <= padding < len(own) else None
        part = own.new_zeros(*ids.shape, own.shape[1]).masked_scatter(
            here[..., None], functional.embedding(ids[here] - first, own, padding)
        )
        with mesh.explained():
            return DTensor.from_local(part, self.ranks, [Partial()]).redistribute(placements=[Replicate()]).to_local()

    def of_heads(self, module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A module on this process's heads; backward, the gradient of its weights is the sum over all heads.

        Not a hook of the weights: FSDP puts others in their place.
        """
        weights = dict(module.named_parameters(recurse=False))
        known = {n: DTensor.from_local(w, self.ranks, [Replicate()]) for n, w in weights.items()}
        try:
            for name, weight in known.items():
                module._parameters[name] = weight.to_local(grad_placements=[Partial()])  # pyright: ignore[reportArgumentType]
            return forward(x)
        finally:
            for name, weight in weights.items():
                module._parameters[name] = weight

    def _shared(self, x: Tensor) -> Tensor:
        """The same numbers; backward, the sum over the processes, once for all matrices that are asked the same."""
        if id(x) not in self._asked:
            known = DTensor.from_local(x, self.ranks, [Replicate()]).to_local(grad_placements=[Partial()])
            self._asked[id(x)] = x, known
        return self._asked[id(x)][1]
