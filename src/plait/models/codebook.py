"""Vector quantization: every vector becomes the nearest of a learned list, and gradients pass as if it had not.

van den Oord et al., "Neural discrete representation learning", https://arxiv.org/abs/1711.00937; moving averages in its
appendix A.1; codes that nobody uses start anew as in Jukebox, https://arxiv.org/abs/2005.00341.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.collectives import all_reduce_sum
from plait.core.errors import ConfigError, DataError
from plait.core.mesh import rank, world

_ROWS = 4_096
"""Vectors compared with all codes at once."""


class Coded(NamedTuple):
    """Codes in place of vectors; the losses are sums over numbers.

    Attributes:
        values: The codes; a gradient on them arrives at the vectors unchanged (straight through).
        ids: Which codes.
        codebook: ``sum |sg(z) - e|^2``, which draws codes to their vectors; 0 where codes are moving averages.
        commitment: ``sum |z - sg(e)|^2``, which keeps vectors near their codes; the paper weighs it with 0.25.
    """

    values: Float[Tensor, "*b d"]
    ids: Int[Tensor, "*b"]
    codebook: Float[Tensor, ""]
    commitment: Float[Tensor, ""]


class VectorQuantizer(nn.Module):
    """``q(z) = e_k`` with ``k = argmin_j |z - e_j|``; equations 1 to 3 of the paper.

    With ``decay`` codes are not learned by gradients: each is the moving average of the vectors that chose it.
    While training, a forward notes who chose what; :meth:`update`, once a step, moves the codes. So a step in several
    micro-batches, or on several ranks, moves them as the whole batch does.

    Args:
        codes: How many.
        d: Width.
        normalize: Compare and return unit vectors (https://arxiv.org/abs/2110.04627).
        decay: Of the moving average, such as 0.99; 0: codes are learned by gradients.
        restart: Codes chosen by fewer vectors a step than this, on average, start anew at a vector of the last step;
            0: never.

    Raises:
        ConfigError: ``decay`` is not in [0, 1), or there is a ``restart`` without it.

    Example:
        >>> quantizer = VectorQuantizer(3, 1)
        >>> quantizer.codes.data = torch.tensor([[-1.0], [0.0], [2.0]])
        >>> found = quantizer(torch.tensor([[0.4], [1.5]]))
        >>> found.ids.tolist(), round(found.commitment.item(), 2)  # 0.4^2 + 0.5^2
        ([1, 2], 0.41)
    """

    codes: Float[Tensor, "code d"]
    usage: Float[Tensor, " code"]
    total: Float[Tensor, "code d"]

    def __init__(
        self, codes: int, d: int, *, normalize: bool = False, decay: float = 0.0, restart: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1 or (restart and not decay):
            raise ConfigError(
                f"decay is {decay:g}, restart {restart:g}",
                place="VectorQuantizer",
                remedy="choose a decay from 0 to below 1; codes start anew only where they are moving averages",
            )
        self.normalize, self.decay, self.restart = normalize, decay, restart
        # Spread as far as vectors of variance 1 are: all codes near 0 would leave most of them unused.
        drawn = self.placed(torch.randn(codes, d))
        self._chosen: Tensor | None = None
        self._sums: Tensor | None = None
        self._latest: Tensor | None = None
        if decay:  # no weight that an optimizer moves: state, like the averages, so that a checkpoint keeps all three
            self.register_buffer("codes", drawn)
            self.register_buffer("usage", torch.ones(codes))
            self.register_buffer("total", drawn.clone())
        else:
            self.codes = nn.Parameter(drawn)

    def forward(self, vectors: Float[Tensor, "*b d"]) -> Coded:
        """Find each vector's code.

        Raises:
            DataError: A vector is not finite: it has no nearest code.
        """
        vectors = self.placed(vectors)
        ids = self.nearest(vectors)
        codes = self.lookup(ids)
        if self.training and self.decay:
            self._note(vectors.detach().flatten(0, -2), ids.flatten())
        codebook = vectors.new_zeros(()) if self.decay else (codes - vectors.detach()).square().sum()
        commitment = (vectors - codes.detach()).square().sum()
        # z - z is 0 to the last bit, so the value is the code itself and not nearly so.
        return Coded(codes.detach() + (vectors - vectors.detach()), ids, codebook, commitment)

    @torch.no_grad()
    def nearest(self, vectors: Float[Tensor, "*b d"]) -> Int[Tensor, "*b"]:
        """Number of the nearest code, compared in float32 or wider.

        Raises:
            DataError: A vector is not finite.
        """
        if not bool(vectors.isfinite().all()):
            raise DataError(
                "a vector to be coded is not finite", place="VectorQuantizer input", remedy="look for what made it so"
            )
        wide = torch.promote_types(vectors.dtype, torch.float32)
        codes = self.placed(self.codes).to(wide)
        half = codes.square().sum(1) / 2
        rows = vectors.flatten(0, -2).to(wide).split(_ROWS)
        found = [(half - row @ codes.T).argmin(1) for row in rows]
        return torch.cat(found).view(vectors.shape[:-1]) if found else vectors.new_zeros(0, dtype=torch.long)

    def lookup(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        """The codes of these numbers."""
        return self.placed(functional.embedding(ids, self.codes))

    @torch.no_grad()
    def update(self, *, generator: torch.Generator | None = None) -> int:
        """Move the codes to the averages of what chose them since the last update; the end of a step.

        Args:
            generator: Chooses the vectors at which unused codes start anew.

        Returns:
            How many codes started anew.

        Raises:
            ConfigError: Codes are learned by gradients.
        """
        if not self.decay:
            raise ConfigError("these codes are learned by gradients", remedy="build the quantizer with a decay")
        # A rank that coded nothing takes part all the same: the others would wait for it.
        zeros = torch.zeros(self.codes.shape, dtype=torch.float64, device=self.codes.device)
        chosen = all_reduce_sum(zeros[:, 0].clone() if self._chosen is None else self._chosen)
        sums = all_reduce_sum(zeros if self._sums is None else self._sums)
        if not chosen.any():
            return 0
        self.usage.lerp_(chosen.to(self.usage), 1 - self.decay)
        self.total.lerp_(sums.to(self.total), 1 - self.decay)
        moved = chosen > 0  # the others would only be divided by ever smaller numbers
        self.codes[moved] = (self.total / self.usage[:, None])[moved].to(self.codes)
        dead = (self.usage < self.restart).nonzero()[:, 0]
        if len(dead):
            # Every rank has other vectors, and all must go on with the same codes: those of the first that has any.
            has = torch.zeros(world(), device=self.codes.device)
            has[rank()] = self._latest is not None
            first = int(all_reduce_sum(has).nonzero()[0, 0])
            fresh = torch.zeros_like(self.codes[dead])
            if rank() == first and self._latest is not None:
                picks = torch.randint(len(self._latest), (len(dead),), generator=generator)
                fresh = self._latest[picks.to(self._latest.device)].to(self.codes)
            self.codes[dead] = all_reduce_sum(fresh)
            self.usage[dead] = 1.0
            self.total[dead] = self.codes[dead].to(self.total)
        self._chosen = self._sums = self._latest = None
        return len(dead)

    def _note(self, vectors: Float[Tensor, "n d"], ids: Int[Tensor, " n"]) -> None:
        if self._chosen is None or self._sums is None:
            self._chosen = torch.zeros(len(self.codes), dtype=torch.float64, device=vectors.device)
            self._sums = torch.zeros(self.codes.shape, dtype=torch.float64, device=vectors.device)
        self._chosen += torch.bincount(ids, minlength=len(self.codes))
        self._sums.index_add_(0, ids, vectors.to(self._sums))
        self._latest = vectors

    def placed(self, vectors: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Vectors as they are compared: of length 1 where codes are."""
        return functional.normalize(vectors, dim=-1) if self.normalize else vectors
