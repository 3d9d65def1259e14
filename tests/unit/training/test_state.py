"""What a checkpoint restores, where the memory order of weights is not the one they are saved in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from plait.training.optim import AdamW, Rates
from plait.training.state import Origin, Progress, TrainState, restore_state, save_state


def test_moments_of_channels_last_filters_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Fused AdamW goes through memory: moments restored in another order would meet the wrong weights."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer, TrainState]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3)
        model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
        state = TrainState(model)
        return model, AdamW().build(state.weights, rates=Rates(lr=0.1)), state

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        pixels = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(pixels).square().sum().backward()
        optimizer.step()

    model, optimizer, state = start()
    step(model, optimizer, 1)
    save_state(tmp_path, state, optimizer, progress=Progress(step=1), origin=Origin(settings={}))
    step(model, optimizer, 2)
    again, restored, other = start()
    assert restore_state(tmp_path, other, restored).step == 1
    step(again, restored, 2)
    for name, weight in model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight), name
