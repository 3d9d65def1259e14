"""Gates over time: they look back only, sum to 1, and follow a modality that becomes noise."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from plait.core.errors import DataError
from plait.models.fusion.streams import Stream
from plait.models.fusion.temporal import TemporalFusion, aligned

pytestmark = pytest.mark.row("S0-20")
WIDTHS = {"audio": 3, "video": 2}


def test_gates_sum_to_one_where_anything_is_there() -> None:
    fuse = TemporalFusion(WIDTHS, 5)
    audio = Stream(tokens=torch.randn(2, 4, 3), real=torch.tensor([[True, True, False, False], [True] * 4]))
    video = Stream(tokens=torch.randn(2, 4, 2), real=torch.tensor([[True, False, True, False], [True] * 4]))
    fused = fuse({"audio": audio, "video": video})
    gates = fused.weights["gates"]
    torch.testing.assert_close(gates.sum(-1), torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0] * 4]))
    assert gates[0, 1].tolist() == [1.0, 0.0]
    torch.testing.assert_close(fused.values[0, 1], fuse.values["audio"](audio.tokens[0, 1]))
    assert fused.real is not None
    assert fused.real.tolist() == [[True, True, True, False], [True] * 4]


def test_no_step_depends_on_a_later_one() -> None:
    fuse = TemporalFusion(WIDTHS, 5)
    audio, video = torch.randn(1, 6, 3, requires_grad=True), torch.randn(1, 6, 2, requires_grad=True)
    values = fuse({"audio": Stream(tokens=audio), "video": Stream(tokens=video)}).values
    values[0, 2].square().sum().backward()
    for x in (audio, video):
        assert x.grad is not None
        assert (x.grad[0] != 0).any(-1).tolist() == [True] * 3 + [False] * 3


def test_gradients() -> None:
    torch.manual_seed(0)
    fuse = TemporalFusion(WIDTHS, 3, d_memory=2).double()
    real = torch.tensor([[True, False, True]])

    def run(audio: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
        return fuse({"audio": Stream(tokens=audio, real=real), "video": Stream(tokens=video)}).values

    drawn = (torch.randn(1, 3, w, dtype=torch.float64, requires_grad=True) for w in WIDTHS.values())
    assert gradcheck(run, tuple(drawn))


def test_gates_follow_a_modality_that_becomes_noise() -> None:
    """Both say the target until one of them turns into noise at a step that differs from sample to sample."""
    torch.manual_seed(0)
    fuse, head = TemporalFusion({"a": 2, "b": 2}, 8, d_memory=8), nn.Linear(8, 1)
    best = torch.optim.Adam([*fuse.parameters(), *head.parameters()], lr=3e-2)

    def draw(count: int) -> tuple[dict[str, Stream], torch.Tensor, torch.Tensor]:
        target = torch.randn(count, 10)
        broken = torch.arange(10) >= torch.randint(3, 8, (count, 1))
        # Beside its value each stream says how much it hisses.
        a = torch.where(broken, 2 * torch.randn(count, 10), target), broken + 0.3 * torch.randn(count, 10)
        b = target + 0.5 * torch.randn(count, 10), 0.3 * torch.randn(count, 10)
        streams = {name: Stream(tokens=torch.stack(x, dim=2)) for name, x in (("a", a), ("b", b))}
        return streams, target, broken

    for _ in range(70):
        streams, target, _ = draw(64)
        best.zero_grad()
        (head(fuse(streams).values)[..., 0] - target).square().mean().backward()
        best.step()
    streams, target, broken = draw(500)
    fused = fuse(streams)
    gate = fused.weights["gates"][..., 0]
    assert gate[~broken].mean() > 0.7  # the better one while it works; measured 0.88
    assert gate[broken].mean() < 0.25  # measured 0.03
    error = (head(fused.values)[..., 0] - target).square().mean()
    said = torch.stack([stream.tokens[..., 0].flatten() for stream in streams.values()], dim=1)
    best_weights = torch.linalg.lstsq(said, target.flatten()[:, None]).solution
    static = (said @ best_weights - target.flatten()[:, None]).square().mean()
    assert error < 0.8 * static  # the best that weights which never change can do; measured: 0.56 of it


def test_streams_of_other_rates_are_aligned() -> None:
    fast = Stream(tokens=torch.arange(6.0).view(1, 6, 1))
    padded = Stream(tokens=torch.tensor([[[1.0], [9.0], [2.0]]]), real=torch.tensor([[True, False, True]]))
    lost = Stream(tokens=torch.full((1, 2, 1), torch.nan), present=torch.tensor([False]))
    found = aligned({"fast": fast, "padded": padded, "lost": lost, "none": Stream(tokens=torch.ones(1, 0, 1))}, 3)
    assert found["fast"].tokens.flatten().tolist() == [1.0, 3.0, 5.0]
    assert found["padded"].tokens.flatten().tolist() == [1.0, 2.0, 2.0]
    assert not found["lost"].there.any()
    assert found["lost"].tokens.isfinite().all()
    assert not found["none"].there.any()
    with pytest.raises(DataError, match="audio 4, video 5"):
        TemporalFusion(WIDTHS, 5)(
            {"audio": Stream(tokens=torch.ones(1, 4, 3)), "video": Stream(tokens=torch.ones(1, 5, 2))}
        )
