"""Connectors that speak in the decoder's own words: tokens where its word embeddings are."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.tensors import Patches
from plait.models.connectors.projection import Chain


class ToWords(nn.Module):
    """Put tokens where the decoder's word embeddings are, so that a decoder reads them from the first step on.

    Of every ``count`` tokens, the first are mixtures of word embeddings, ``softmax(scale * cos(x, w - center)) @ w``
    over a list of words (AlignVLM, https://arxiv.org/abs/2502.01341, has the same with the whole vocabulary). The last
    ``free`` may point anywhere, at the distance that words have: ``center + length * v / |v|`` with
    ``v = shape @ x / |x|``; a mixture cannot say how much the picture is like a word that is not in the list. Before it
    is shaped, ``x`` is compared with whitened words, whose dimensions all count alike: embeddings have a few dimensions
    that vary much and tell little, and many that vary little and tell words apart.

    Args:
        words: Embeddings of the words, ``word d``; a buffer.
        shape: How all words of the decoder spread (:func:`shape_of`), ``d d``; a buffer.
        count: Tokens that belong together.
        free: How many of them are not mixtures.
        scale: Factor on the cosine at the start; learned.
    """

    words: Tensor
    shape: Tensor

    def __init__(
        self,
        words: Float[Tensor, "word d"],
        shape: Float[Tensor, "d d"],
        *,
        count: int,
        free: int,
        scale: float = 12.0,
    ) -> None:
        super().__init__()
        self.d_out = words.shape[1]
        self.count, self.free = count, free
        self.register_buffer("words", words)
        self.register_buffer("shape", shape)
        self.scale = nn.Parameter(torch.tensor(scale))
        self.length = nn.Parameter((words - words.mean(0)).norm(dim=1).mean())

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Unchanged."""
        return grid

    def forward(self, media: Patches) -> Patches:
        """Move every token."""
        groups = media.values.view(-1, self.count, self.d_out)
        mixed = self.scores(groups[:, : self.count - self.free]).softmax(-1) @ self.words
        free = nn.functional.normalize(groups[:, self.count - self.free :], dim=-1)
        directions = self.center + self.length * nn.functional.normalize(free @ self.shape, dim=-1)
        return Patches(values=torch.cat([mixed, directions], dim=1).flatten(0, 1), grid=media.grid)

    @property
    def center(self) -> Float[Tensor, " d"]:
        """Mean of the words."""
        return self.words.mean(0)

    def scores(self, values: Float[Tensor, "*n d"]) -> Float[Tensor, "*n word"]:
        """How much each token is like each word, before the softmax: the scaled cosine, seen from their center."""
        directions = nn.functional.normalize(self.words - self.center, dim=-1)
        return self.scale * nn.functional.normalize(values, dim=-1) @ directions.T

    def whitened(self, embeddings: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Unit vectors of free tokens, before they are shaped, that would land on embeddings.

        Raises:
            torch.linalg.LinAlgError: The shape is singular: floor 0 and embeddings that leave out a direction.
        """
        return nn.functional.normalize(torch.linalg.solve(self.shape, (embeddings - self.center).T).T, dim=-1)


def shape_of(table: Float[Tensor, "word d"], *, floor: float = 0.1) -> Float[Tensor, "d d"]:
    """Square root of the covariance of embeddings, in units of the mean deviation; a shape for :class:`ToWords`.

    Its inverse whitens, as is done to sentence embeddings that are compared (arXiv 2103.15316); the floor is ours.

    Args:
        table: A decoder's embeddings.
        floor: Added to every deviation, so that directions in which words hardly differ are not blown up.
    """
    values, vectors = torch.linalg.eigh(torch.cov(table.float().T))
    deviations = values.clamp(min=0).sqrt()
    return vectors @ torch.diag(deviations / deviations.mean() + floor) @ vectors.T


class WordReader(nn.Module):
    """A connector that ends in :class:`ToWords`, asked what it reads instead of for tokens: no decoder is needed.

    Args:
        connector: Trained in place.
        names: Embedding of each training name, ``name d``: the mean of its words.
    """

    names: Tensor

    def __init__(self, connector: "Chain", names: Float[Tensor, "name d"]) -> None:
        super().__init__()
        words = connector.parts[-1]
        assert isinstance(words, ToWords)
        self.connector = connector
        self.register_buffer("names", words.whitened(names), persistent=False)

    def forward(self, media: Patches) -> tuple[Float[Tensor, "b k word"], Float[Tensor, "b name"]]:
        """Scores of the words at each mixed token, and of the names over the mean of the free tokens.

        A picture of several cells is read as one: as the mean of its cells.
        """
        *front, words = self.connector.parts
        assert isinstance(words, ToWords)
        media = Patches(values=media.values.to(words.words.dtype), grid=media.grid)  # cached features have 16 bits
        for part in front:
            media = part(media)
        cells: list[int] = (media.grid.prod(1) // words.count).tolist()
        groups = media.values.view(-1, words.count, words.d_out).split(cells)
        groups = torch.stack([group.mean(0) for group in groups])
        mixed = words.count - words.free
        directions = nn.functional.normalize(groups[:, mixed:], dim=-1).mean(1)
        return words.scores(groups[:, :mixed]), words.scale * directions @ self.names.T
