"""Concatenation, attention and gates over pooled vectors: closed forms."""

import pytest
import torch
from torch.autograd import gradcheck

from plait.core.errors import ConfigError
from plait.models.fusion.attention import AttentionFusion
from plait.models.fusion.concat import ConcatFusion
from plait.models.fusion.gated import GatedFusion
from plait.models.fusion.missing import MissingTokens
from plait.models.fusion.streams import Stream, vector

WIDTHS = {"image": 5, "text": 4}


@pytest.mark.row("S0-14", "S3-12")
def test_concatenation_is_the_flattened_inputs() -> None:
    image, text = torch.randn(2, 3, 5), torch.randn(2, 1, 4)
    inputs = {"image": Stream(tokens=image), "text": Stream(tokens=text)}
    found = ConcatFusion({"image": 15, "text": 4})(inputs).values
    assert torch.equal(found, torch.cat([image.flatten(1), text.flatten(1)], dim=1))


@pytest.mark.row("S0-14")
@pytest.mark.parametrize("normalize", ["layer", "unit", "rms"])
def test_normalized_a_modality_cannot_dominate_by_its_scale(normalize: str) -> None:
    image, text = torch.randn(2, 5), torch.randn(2, 4)
    fuse = ConcatFusion(WIDTHS, normalize=normalize)
    small = fuse({"image": vector(image), "text": vector(text)}).values
    large = fuse({"image": vector(100 * image), "text": vector(text)}).values
    torch.testing.assert_close(large, small, atol=1e-3, rtol=1e-3)  # layer has an eps beside the variance
    raw = ConcatFusion(WIDTHS)({"image": vector(100 * image), "text": vector(text)}).values
    assert raw[:, :5].norm() > 20 * raw[:, 5:].norm()


@pytest.mark.row("S0-15")
def test_weights_of_a_sample_sum_to_one_over_who_is_there() -> None:
    fuse = AttentionFusion({**WIDTHS, "audio": 3}, 8, heads=2).eval()
    here = torch.tensor([[True, True, True], [True, False, True], [False, False, True], [False, False, False]])
    inputs = {n: vector(torch.randn(4, w), here[:, i]) for i, (n, w) in enumerate(fuse.widths.items())}
    fused = fuse(inputs)
    weights = fused.weights["modality"]
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert bool(((weights > 0) == here).all())
    assert fused.values[3].tolist() == [0.0] * 8
    assert fused.present.tolist() == [True, True, True, False]


@pytest.mark.row("S0-15")
def test_a_modality_that_is_noise_loses_weight_in_training() -> None:
    """Two modalities say the label, in half of the samples one of them is loud noise: attention learns which."""
    torch.manual_seed(0)
    fuse, head = AttentionFusion({"a": 4, "b": 4}, 16), torch.nn.Linear(16, 2)
    best = torch.optim.Adam([*fuse.parameters(), *head.parameters()], lr=3e-2)

    def draw(count: int) -> tuple[dict[str, Stream], torch.Tensor, torch.Tensor]:
        label, noisy = torch.randint(2, (count,)), torch.randint(2, (count,))
        clean = torch.nn.functional.one_hot(label, 4).float() + 0.1 * torch.randn(count, 4)
        noise = torch.tensor([0.0, 0.0, 3.0, 0.0]) + torch.randn(count, 4) * torch.tensor([2.0, 2.0, 0.1, 0.1])
        picked = [torch.where((noisy == i)[:, None], noise, clean) for i in range(2)]
        return {"a": vector(picked[0]), "b": vector(picked[1])}, label, noisy

    for _ in range(60):
        inputs, label, _ = draw(64)
        best.zero_grad()
        torch.nn.functional.cross_entropy(head(fuse(inputs).values), label).backward()
        best.step()
    inputs, label, noisy = draw(400)
    fused = fuse(inputs)
    weight = fused.weights["modality"].gather(1, noisy[:, None]).mean()
    assert weight < 0.15  # 0.5 at the start; measured 0.01
    assert (head(fused.values).argmax(1) == label).float().mean() > 0.95


@pytest.mark.row("S0-16")
def test_gates_are_the_papers_equations() -> None:
    image, text = torch.randn(3, 5), torch.randn(3, 4)
    inputs = {"image": vector(image), "text": vector(text)}
    many = GatedFusion(WIDTHS, 6, bias=False)
    both = torch.cat([image, text], dim=1)
    z = {n: torch.sigmoid(both @ gate.weight.mT) for n, gate in many.gates.items()}
    h = {n: torch.tanh(x @ many.hidden[n].weight.mT) for n, x in (("image", image), ("text", text))}
    torch.testing.assert_close(many(inputs).values, z["image"] * h["image"] + z["text"] * h["text"])
    biased = GatedFusion(WIDTHS, 6)
    lost = biased({"image": vector(image, torch.tensor([True, False, False])), "text": vector(text)})
    assert lost.weights["gates"].ne(0).any(2).tolist() == [[True, True], [False, True], [False, True]]
    alone = (
        torch.sigmoid(biased.gates["text"](torch.cat([0 * image, text], dim=1))) * biased.hidden["text"](text).tanh()
    )
    torch.testing.assert_close(lost.values[1:], alone[1:])  # the bias of what is absent is not added either
    tied = GatedFusion(WIDTHS, 6, tied=True, bias=False)
    z1 = torch.sigmoid(both @ tied.gates["image"].weight.mT)
    h = {n: torch.tanh(x @ tied.hidden[n].weight.mT) for n, x in (("image", image), ("text", text))}
    fused = tied(inputs)
    torch.testing.assert_close(fused.values, z1 * h["image"] + (1 - z1) * h["text"])
    torch.testing.assert_close(fused.weights["gates"].sum(1), torch.ones(3, 6))
    lost = tied({"image": vector(image, torch.zeros(3, dtype=torch.bool)), "text": vector(text)})
    torch.testing.assert_close(lost.values, h["text"])  # its gate is 0, so the other's is 1


@pytest.mark.row("S0-16")
def test_a_closed_gate_lets_nothing_through() -> None:
    """A gate that sees its own modality and is pushed to 0 stops values and gradients."""
    fuse = GatedFusion(WIDTHS, 6, sees="own")
    with torch.no_grad():
        fuse.gates["image"].bias.fill_(-1e4)
        fuse.gates["image"].weight.zero_()
    text = torch.randn(3, 4)
    image = torch.randn(3, 5, requires_grad=True)
    fused = fuse({"image": vector(image), "text": vector(text)})
    assert fused.weights["gates"][:, 0].eq(0).all()
    assert torch.equal(fused.values, fuse({"image": vector(torch.randn(3, 5)), "text": vector(text)}).values)
    fused.values.square().sum().backward()
    assert image.grad is not None
    assert image.grad.eq(0).all()
    for weight in (*fuse.hidden["image"].parameters(), *fuse.gates["image"].parameters()):
        assert weight.grad is not None
        assert weight.grad.eq(0).all()


def test_a_tied_gate_is_for_two() -> None:
    with pytest.raises(ConfigError, match="for two modalities and sees both; came 3"):
        GatedFusion({"a": 1, "b": 1, "c": 1}, 2, tied=True)


@pytest.mark.row("S0-15", "S0-16")
@pytest.mark.parametrize(
    "fuse", [AttentionFusion(WIDTHS, 4, heads=2), GatedFusion(WIDTHS, 3)], ids=["attention", "gated"]
)
def test_gradients(fuse: torch.nn.Module) -> None:
    fuse = fuse.double()
    here = torch.tensor([True, False])

    def run(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return fuse({"image": vector(image, here), "text": vector(text)}).values

    drawn = (torch.randn(2, w, dtype=torch.float64, requires_grad=True) for w in WIDTHS.values())
    assert gradcheck(run, tuple(drawn))


def test_missing_tokens_take_the_place_of_an_empty_stream() -> None:
    fill = MissingTokens({"image": 3})
    found = fill({"image": Stream(tokens=torch.ones(2, 0, 3))})["image"]
    assert torch.equal(found.mean(), fill.tokens["image"].expand(2, 3))
