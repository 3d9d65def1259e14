"""Bilinear pooling: outer products, exact expectation of the count sketch, weights, and a task that needs products."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from plait.models.fusion.bilinear import (
    BilinearFusion,
    FactorizedBilinear,
    LowRankBilinear,
    LowRankTensor,
    power_normalized,
    with_one,
)
from plait.models.fusion.compact import CompactBilinear, CountSketch, product_sketch
from plait.models.fusion.concat import ConcatFusion
from plait.models.fusion.streams import Fusion, Stream, vector

TWO = {"image": 5, "text": 4}
THREE = {"image": 3, "text": 2, "audio": 4}
pytestmark = pytest.mark.row("S0-17")


def two(image: Tensor, text: Tensor) -> dict[str, Stream]:
    return {"image": vector(image), "text": vector(text)}


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mlb_and_mfb_are_their_equations() -> None:
    image, text = torch.randn(3, 5), torch.randn(3, 4)
    mlb = LowRankBilinear(TWO, 6, rank=7)
    u, v = mlb.factors["image"], mlb.factors["text"]
    wanted = mlb.out(torch.tanh(u(image)) * torch.tanh(v(text)))
    torch.testing.assert_close(mlb(two(image, text)).values, wanted)
    mfb = FactorizedBilinear(TWO, 6, k=3, bias=False, normalize=False)
    # Each number is a bilinear form of rank k.
    u, v = (mfb.factors[n].weight.view(6, 3, -1) for n in ("image", "text"))
    forms = torch.einsum("oki,okj->oij", u, v)
    assert all(int(torch.linalg.matrix_rank(form)) == 3 for form in forms)
    torch.testing.assert_close(mfb(two(image, text)).values, torch.einsum("bi,oij,bj->bo", image, forms, text))


def test_low_rank_tensor_is_the_tensor_times_the_outer_product() -> None:
    fuse = LowRankTensor(THREE, 5, rank=2)
    x = [torch.randn(3, width) for width in THREE.values()]
    a, b, c = map(with_one, x)
    wanted = torch.einsum("bi,bj,bk,ijko->bo", a, b, c, fuse.tensor()) + fuse.bias
    found = fuse(dict(zip(THREE, map(vector, x), strict=True))).values
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def sketches(d: int, size: int) -> list[CountSketch]:
    """All there are."""
    return [
        CountSketch(torch.tensor(places), torch.tensor(signs), size=size)
        for places in product(range(size), repeat=d)
        for signs in product((-1, 1), repeat=d)
    ]


def test_the_sketch_of_a_product_is_unbiased_exactly() -> None:
    """The mean over all hash functions there are, not over some: <x, u> <y, v>."""
    x, u, y, v = (torch.randn(1, 2, dtype=torch.float64) for _ in range(4))
    every = sketches(2, 2)
    found = [
        (product_sketch([first(x), second(y)]) * product_sketch([first(u), second(v)])).sum()
        for first in every
        for second in every
    ]
    torch.testing.assert_close(torch.stack(found).mean(), (x * u).sum() * (y * v).sum())
    single = torch.stack([(sketch(x) * sketch(u)).sum() for sketch in every])
    torch.testing.assert_close(single.mean(), (x * u).sum())
    assert float(single.std()) > 0  # each one alone is wrong


def test_the_convolution_is_the_sketch_of_the_outer_product() -> None:
    x, y = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    fuse = CompactBilinear({"image": 4, "text": 3}, 5, size=7, generator=drawn(), one=False)
    first, second = fuse.sketches["image"], fuse.sketches["text"]
    places = (first.places[:, None] + second.places) % 7
    outer = CountSketch(places.flatten(), (first.signs[:, None] * second.signs).flatten(), size=7)
    wanted = outer((x[:, :, None] * y[:, None, :]).flatten(1))
    found = product_sketch([first(x), second(y)])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        fuse.double()(two(x, y)).values, fuse.out(power_normalized(wanted)), atol=1e-7, rtol=1e-7
    )
    again = CompactBilinear({"image": 4, "text": 3}, 5, size=7, generator=drawn(), one=False)
    assert torch.equal(again.sketches["image"].places, first.places)


def test_signed_root_has_a_finite_gradient_at_zero() -> None:
    x = torch.tensor([[0.0, 4.0, -9.0]], requires_grad=True)
    found = power_normalized(x)
    torch.testing.assert_close(found, torch.tensor([[0.0, 2.0, -3.0]]) / 13**0.5, atol=1e-6, rtol=1e-6)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_numbers_of_weights() -> None:
    """d1 d2 o for the whole form; rank (d1 + d2) and the like for the others."""
    d1, d2, o, rank, k, size = 50, 40, 30, 8, 5, 60
    widths = {"image": d1, "text": d2}
    count = lambda fuse: sum(p.numel() for p in fuse.parameters())  # noqa: E731
    assert count(BilinearFusion(widths, o, one=False)) == d1 * d2 * o + o
    assert count(LowRankBilinear(widths, o, rank=rank)) == rank * (d1 + d2 + 2) + o * (rank + 1)
    assert count(FactorizedBilinear(widths, o, k=k, bias=False)) == k * o * (d1 + d2)
    assert count(LowRankTensor(widths, o, rank=rank)) == rank * o * (d1 + d2 + 2) + rank + o
    assert count(CompactBilinear(widths, o, size=size, generator=drawn())) == o * (size + 1)


FORMS = {
    "full": lambda: BilinearFusion({"a": 1, "b": 1}, 2),
    "mlb": lambda: LowRankBilinear({"a": 1, "b": 1}, 2, rank=4),
    "mfb": lambda: FactorizedBilinear({"a": 1, "b": 1}, 2, k=4, normalize=False),
    "lmf": lambda: LowRankTensor({"a": 1, "b": 1}, 2, rank=4),
    "mcb": lambda: CompactBilinear({"a": 1, "b": 1}, 2, size=16, generator=drawn(0)),
}


def accuracy_on_xor(fuse: Fusion) -> float:
    assert isinstance(fuse, nn.Module)
    torch.manual_seed(0)
    a, b = torch.randint(2, (256, 1)) * 2.0 - 1, torch.randint(2, (256, 1)) * 2.0 - 1
    label = (a != b).long()[:, 0]
    noise = 0.2
    inputs = {"a": vector(a + noise * torch.randn(256, 1)), "b": vector(b + noise * torch.randn(256, 1))}
    best = torch.optim.Adam(fuse.parameters(), lr=1e-1)
    for _ in range(80):
        best.zero_grad()
        nn.functional.cross_entropy(fuse(inputs).values, label).backward()
        best.step()
    return (fuse(inputs).values.argmax(1) == label).float().mean().item()


@pytest.mark.parametrize("name", FORMS)
def test_products_solve_xor(name: str) -> None:
    torch.manual_seed(1)
    assert accuracy_on_xor(FORMS[name]()) > 0.97  # measured: 1.0


@pytest.mark.row("S0-14")
def test_a_linear_layer_on_the_concatenation_cannot() -> None:
    torch.manual_seed(1)
    assert accuracy_on_xor(ConcatFusion({"a": 1, "b": 1}, d_out=2)) < 0.76  # at most 3 of 4 corners


GRADIENTS = {
    "full": lambda: BilinearFusion(TWO, 3),
    "mlb": lambda: LowRankBilinear(TWO, 3, rank=4),
    "mfb": lambda: FactorizedBilinear(TWO, 3, k=2),
    "lmf": lambda: LowRankTensor(TWO, 3, rank=2),
    "mcb": lambda: CompactBilinear(TWO, 3, size=6, generator=drawn()),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str) -> None:
    torch.manual_seed(0)
    fuse = GRADIENTS[name]().double()
    here = torch.tensor([True, False])

    def run(image: Tensor, text: Tensor) -> Tensor:
        return fuse({"image": vector(image, here), "text": vector(text)}).values

    # Without text in the second sample, so that zero products are among what is differentiated.
    drawn = tuple(torch.randn(2, w, dtype=torch.float64, requires_grad=True) for w in TWO.values())
    assert gradcheck(run, drawn)
