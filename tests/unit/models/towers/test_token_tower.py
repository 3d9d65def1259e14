"""Texts of different lengths through a text tower that learns: each as if it were alone."""

import pytest
import torch
from torch import Tensor

from plait.core.errors import DataError
from plait.core.tensors import Patches
from plait.models.build_media import build_text
from plait.models.measure import media_account
from plait.models.text_specs import Bert, Gpt, Llama
from plait.models.towers.text_transformer import TextTransformer
from plait.models.towers.token_tower import TokenTower

SPECS = {
    "gpt": Gpt(vocabulary=40, max_tokens=8, d=16, depth=2, heads=2, dropout=0.0, head=False),
    "bert": Bert(vocabulary=40, max_tokens=8, d=16, depth=2, heads=2, dropout=0.0),
    "llama": Llama(vocabulary=40, d=16, depth=2, heads=2, d_ff=24, head=False),
    "mean": Gpt(vocabulary=40, max_tokens=8, d=16, depth=2, heads=2, dropout=0.0, head=False, pool="mean"),
}
TEXTS = [[1, 5, 6, 2], [1, 2], [1, 9, 9, 9, 30, 2], [1, 7, 2]]


def media(texts: list[list[int]]) -> Patches:
    ids = torch.tensor([one for text in texts for one in text], dtype=torch.float32)[:, None]
    return Patches(values=ids, grid=torch.tensor([[1, 1, len(text)] for text in texts], dtype=torch.long).view(-1, 3))


def tower_of(kind: str) -> TokenTower:
    torch.manual_seed(0)
    transformer = build_text(SPECS[kind])
    assert isinstance(transformer, TextTransformer)
    return TokenTower(transformer).double()


@pytest.mark.parametrize("kind", SPECS)
def test_each_text_is_read_as_if_alone_in_values_and_gradients(kind: str) -> None:
    tower = tower_of(kind)
    together = tower(media(TEXTS)).values
    alone = torch.cat([tower.transformer.pooled(torch.tensor([text])) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    probe = torch.randn(alone.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradients(vectors: Tensor) -> list[Tensor]:
        tower.zero_grad()
        (vectors * probe).sum().backward()
        return [weight.grad.clone() for weight in tower.parameters() if weight.grad is not None]

    for one, other in zip(gradients(together), gradients(alone), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_no_texts_give_no_vectors_and_a_long_one_is_refused() -> None:
    tower = tower_of("gpt").float()
    assert tower(media([])).values.shape == (0, 16)
    with pytest.raises(DataError, match="9"):
        tower(media([[1, *range(3, 10), 2]]))


def test_what_a_text_costs_is_counted_without_a_weight() -> None:
    found = media_account(lambda: tower_of("gpt").float(), (1, 1, 6), channels=1)
    d, tokens, depth = 16, 6, 2
    products = 2 * tokens * 12 * d * d * depth + 2 * 2 * tokens * tokens * d * depth
    assert (found.flops, found.tokens, found.d_out) == (products, 1, d)
