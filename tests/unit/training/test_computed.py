"""Head, recomputation and compilation as settings of the loop: other ways to the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from plait.core.device import Compute
from plait.core.errors import ConfigError
from plait.core.events import Events
from plait.core.tensors import IGNORE, Batch
from plait.models.connectors.projection import Mlp
from plait.models.documents import NAME, read_by_document
from plait.models.multimodal import MultimodalLM
from plait.objectives.language import NextToken
from plait.training import computed as module
from plait.training.loop import fit
from plait.training.optim import AdamW
from plait.training.settings import Hooks, Settings
from plait.training.trainer import Trainer

CPU = Compute(device="cpu", dtype="float32", threads=torch.get_num_threads(), why=())


def language() -> MultimodalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.2,
    )
    return MultimodalLM({}, {"image": Mlp(6, 8, 32)}, LlamaForCausalLM(config), placeholder=40).train()


class Steps:
    """Rows of random words, all trained."""

    def step_batches(self, step: int) -> list[Batch]:
        ids = torch.randint(3, 39, (2, 12), generator=torch.Generator().manual_seed(step))
        labels = ids.clone()
        labels[:, :4] = IGNORE
        return [
            Batch(token_ids=ids, labels=labels, segment_ids=torch.ones_like(ids), media={}, item_row={},
                  sample_ids=(f"{step}a", f"{step}b"))
        ]  # fmt: skip


def trained(folder: Path, events: Events | None = None, **how: Any) -> tuple[float, dict[str, Tensor], list[bool]]:
    """Loss after three steps, the weights, and whether the fused head was on in each."""
    model, fused = language(), []
    settings = Settings(steps=3, compute=CPU).with_trainer(Trainer(optimizer=AdamW(), **how), lr=1e-2)
    result = fit(
        model,
        NextToken(),
        Steps(),
        settings=settings,
        folder=folder,
        events=events or Events(),
        hooks=Hooks(on_step=lambda *_: fused.append(model.fused)),
    )
    assert model.fused
    assert not any("forward" in part.__dict__ for part in model.modules())
    return result.values["loss"], {n: w.detach().clone() for n, w in model.named_parameters()}, fused


def test_recomputation_ends_with_the_very_bits(tmp_path: Path) -> None:
    loss, weights, _ = trained(tmp_path / "none")
    for how in ("full", "selective"):
        again, same, _ = trained(tmp_path / how, recompute=how)
        assert again == loss
        assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_a_run_goes_on_with_another_way(tmp_path: Path) -> None:
    first = Settings(steps=2, compute=CPU).with_trainer(Trainer(), lr=1e-2)
    other = Settings(steps=2, compute=CPU).with_trainer(Trainer(recompute="full", head="full", compile=True), lr=1e-2)
    assert first.plain() == other.plain()


def test_the_full_head_gives_the_same_loss(tmp_path: Path) -> None:
    loss, _, fused = trained(tmp_path / "fused")
    other, _, full = trained(tmp_path / "full", head="full")
    assert other == pytest.approx(loss, rel=1e-5)
    assert (fused, full) == ([True] * 3, [False] * 3)


def test_compiled_blocks_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = module.compiled

    @contextmanager
    def traced(model: nn.Module) -> Iterator[int]:
        with plain(model, backend="aot_eager") as count:
            yield count

    monkeypatch.setattr(module, "compiled", traced)
    said: list[str] = []
    events = Events()
    monkeypatch.setattr(events, "note", lambda text, **_: said.append(text))
    loss, _, _ = trained(tmp_path / "plain")
    found, _, _ = trained(tmp_path / "compiled", events, compile=True, recompute="full")
    assert found == pytest.approx(loss, rel=1e-4)
    assert any("2 blocks run compiled" in line for line in said)
    assert any("2 blocks are recomputed in the backward pass (full)" in line for line in said)


def test_compiled_decoders_attend_under_one_mask_and_by_document_again_afterwards() -> None:
    model = language()
    assert read_by_document(model.decoder)
    with module.under_masks(model):
        assert model.decoder.config._attn_implementation == "eager"  # pyright: ignore[reportAttributeAccessIssue]
    assert model.decoder.config._attn_implementation == NAME  # pyright: ignore[reportAttributeAccessIssue]


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="of which a compiled block has one"):
        Trainer(compile=True, recompute="selective")
    settings = Settings(steps=3, compute=CPU, compile=True, recompute="selective")  # from Python, past the recipe
    with (
        pytest.raises(ConfigError, match="a compiled block has one") as caught,
        module.computed(language(), settings, events=Events()),
    ):
        pass
    assert caught.value.place == "trainer.recompute"
