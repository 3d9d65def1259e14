"""Expert parallelism: neighbouring data shares divide the experts of a language model between them.

Of each layer's experts a process holds, updates and saves its own; tokens go to the process that holds their expert and
come back (:mod:`plait.models.moe_parallel`). The gradient of an expert is complete but for the tokens of the other
groups that hold the same ones. All else is data parallel.

Lepikhin et al., GShard, https://arxiv.org/abs/2006.16668, section 3.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from plait.core.errors import ConfigError
from plait.core.grid import Grid
from plait.models.mixtral import mixtures
from plait.models.moe_parallel import Dispatch

EXPERT = "expert"


class ExpertGroups:
    """The processes that divide the experts, and those that hold the same ones as this process.

    Args:
        grid: Its data shares are divided into groups of neighbours.
        size: Processes of a group.
        device: ``cpu`` or ``cuda``.

    Attributes:
        ranks: Of this process's group.
        copies: Holds the same experts; None where nobody else does.
    """

    def __init__(self, grid: Grid, size: int, *, device: str) -> None:
        outer, inner = grid.pipeline, grid.context * grid.tensor
        names = ("outer", "copies", EXPERT, "inner")
        devices = init_device_mesh(device, (outer, grid.data // size, size, inner), mesh_dim_names=names)
        self.ranks: DeviceMesh = devices[EXPERT]
        self.copies: ProcessGroup | None = devices["copies"].get_group() if grid.data > size else None

    def deal_out(self, model: nn.Module) -> None:
        """Let each layer with experts of ``model`` keep this process's, in place; their weights become ``DTensor``.

        Raises:
            ConfigError: There is no such layer, or its experts cannot be dealt out evenly.
        """
        layers = mixtures(model)
        if not layers:
            raise ConfigError(
                f"{type(model).__name__} has no layers with experts",
                place="trainer.parallel.expert",
                remedy="set it to 1, or use a decoder with experts (mixtral)",
            )
        for layer in layers:
            layer.through = Dispatch(self.ranks.get_group(), experts=layer.count)
            for name, weight in list(layer.experts.named_parameters()):
                own = weight.detach().chunk(self.ranks.size())[self.ranks.get_local_rank()].clone()
                piece = DTensor.from_local(own, self.ranks, [Shard(0)])
                layer.experts.register_parameter(name, nn.Parameter(piece, requires_grad=weight.requires_grad))


def of_expert(weight: Tensor) -> bool:
    """Whether it is a piece of experts that several processes hold."""
    return isinstance(weight, DTensor) and weight.device_mesh.mesh_dim_names == (EXPERT,)
