"""The estimate of tune counts what its models really have; settings that cost more say so; importing loads no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plait.core.errors import ConfigError
from plait.core.estimate import Estimate, Machine
from plait.models.specs import Words
from plait.stages.tune import Adapt, Tune
from plait.stages.tuning import needs
from plait.training.trainer import Trainer

MACHINE = Machine(
    cores=2, memory_bytes=8 * 2**30, disk_bytes=50 * 2**30, gemm_fp32=2.8e11, gemm_bf16=1.3e12, measured=True
)
DATA = Estimate(stage="data", samples={"train": 1127, "test-concept": 200, "test-style": 200, "test-both": 200})


def test_importing_the_settings_loads_no_torch() -> None:
    code = "import sys, plait.stages.tune; print('torch' in sys.modules, 'transformers' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False"]


@pytest.mark.parametrize("connect", [Words(), Words(tokens=4, d_hidden=256, free=1)])
def test_weights_are_those_of_connector_and_adapter(connect: Words) -> None:
    import torch

    from plait.models.connectors.projection import Chain, Mlp, PixelShuffle, Split
    from plait.models.connectors.words import ToWords
    from plait.training.cost import SMOLLM2_135M, Lora

    shuffle, width = PixelShuffle(needs.IMAGE_WIDTH, 2), SMOLLM2_135M.d_model
    with torch.device("meta"):
        wide = width * connect.tokens
        connector = Chain(
            shuffle,
            Mlp(shuffle.d_out, connect.d_hidden, wide),
            Split(wide, connect.tokens),
            ToWords(torch.zeros(7, width), torch.zeros(width, width), count=connect.tokens, free=connect.free),
        )
    targets = ("q_proj", "down_proj")
    stage = Tune(connector=connect, adapt=Adapt(rank=8, targets=targets))
    expected = sum(weight.numel() for weight in connector.parameters())
    expected += Lora(rank=8, targets=targets).params(SMOLLM2_135M)
    assert stage.estimate(MACHINE, {"data": DATA}).params_trainable == expected


def test_more_of_anything_costs_more() -> None:
    base = Tune().estimate(MACHINE, {"data": DATA})
    assert 0 < base.seconds[0] < base.seconds[1]
    assert set(base.samples) == {"train", "test-concept", "test-style", "test-both"}
    for larger in (
        {"resolution": 224},
        {"views": 8},
        {"batch_size": 64},
        {"adapt": {"steps": 500}},
        {"words": {"steps": 2000}},
    ):
        more = Tune.model_validate(larger).estimate(MACHINE, {"data": DATA})
        assert more.flops > base.flops, larger
        assert more.seconds[1] > base.seconds[1], larger
    wider = Tune(connector=Words(d_hidden=4096)).estimate(MACHINE, {"data": DATA})
    assert sum(wider.memory.values()) > sum(base.memory.values())
    assert wider.disk_bytes > base.disk_bytes
    assert Tune(views=8).estimate(MACHINE, {"data": DATA}).home_bytes > base.home_bytes
    assert Tune().estimate(MACHINE, {}).params_trainable == base.params_trainable


def test_judging_costs_forward_passes() -> None:
    def flops(**validation: Any) -> float:
        given = {"validation": validation} if validation else {}
        return Tune.model_validate({"trainer": given}).estimate(MACHINE, {"data": DATA}).flops

    base, once, often = flops(), flops(every=1000, gap=False), flops(every=10, gap=False)
    assert base < once < often
    # Two phases end with one each; of 5 and 120 steps every tenth: 1 and 12.
    assert (often - base) / (once - base) == pytest.approx(13 / 2)
    assert (flops(every=10) - base) / (often - base) == pytest.approx(2)


def test_recomputation_takes_less_memory_and_more_time_and_a_full_head_more_memory() -> None:
    def of(**trainer: Any) -> Estimate:
        return needs.estimate(Tune(batch_size=200, trainer=Trainer(**trainer)), MACHINE, {"data": DATA})

    plain, full, selective = (of(recompute=how) for how in ("none", "full", "selective"))
    kept = [estimate.memory["activations"] for estimate in (full, selective, plain)]
    assert kept == sorted(set(kept))
    assert full.flops > 1.2 * plain.flops
    assert plain.flops < selective.flops < 1.1 * plain.flops
    assert of(head="full").memory["activations"] > plain.memory["activations"]


def test_without_a_cache_the_tower_runs_in_every_step_and_nothing_is_kept() -> None:
    cached, fresh = (needs.estimate(Tune(cache=cache), MACHINE, {"data": DATA}) for cache in (True, False))
    assert fresh.flops > cached.flops
    assert cached.home_bytes > fresh.home_bytes == 0


def test_without_packing_each_question_has_a_row() -> None:
    packed, alone = (needs.estimate(Tune(packing=packing), MACHINE, {"data": DATA}) for packing in (True, False))
    assert alone.image_tokens == packed.image_tokens
    assert alone.tokens != packed.tokens


def test_the_tower_is_the_real_one() -> None:
    from plait.models.towers.convnet import EfficientNetLite

    tower = EfficientNetLite()
    assert (tower.d_out, sum(p.numel() for p in tower.parameters())) == (needs.IMAGE_WIDTH, needs.IMAGE_WEIGHTS)


@pytest.mark.parametrize("kind", ["linear", "mlp", "qformer", "resampler", "gated-cross-attention"])
def test_every_connector_has_its_own_account(kind: str) -> None:
    import torch

    from plait.models.build import build_connector, build_reading
    from plait.models.specs import GatedCrossAttention
    from plait.training.cost import SMOLLM2_135M as SHAPE
    from plait.training.cost import Lora

    stage = Tune.model_validate({"connector": {"kind": kind}, "resolution": 128})
    found = stage.estimate(MACHINE, {"data": DATA})
    with torch.device("meta"):
        parts: list[Any] = [build_connector(stage.connector, d_in=needs.IMAGE_WIDTH, d_out=SHAPE.d_model)]
        if isinstance(stage.connector, GatedCrossAttention):
            parts += build_reading(stage.connector, d_in=needs.IMAGE_WIDTH, d=SHAPE.d_model, layers=SHAPE.layers)
    weights = sum(weight.numel() for part in parts if part is not None for weight in part.parameters())
    assert found.params_trainable == weights + Lora(rank=16, targets=stage.adapt.targets).params(SHAPE)
    tokens = {"linear": 16, "mlp": 16, "qformer": 32, "resampler": 64, "gated-cross-attention": 64}[kind]
    assert any(f"{tokens} tokens a picture" in note for note in found.notes), found.notes


def test_a_new_decoder_too_short_for_a_picture_is_refused_before_anything_runs() -> None:
    stage = Tune.model_validate(
        {"decoder": {"kind": "new", "d": 64, "context": 30}, "connector": {"kind": "mlp"}, "resolution": 128}
    )
    with pytest.raises(ConfigError, match="a picture takes 16 places") as caught:
        stage.estimate(MACHINE, {"data": DATA})
    assert caught.value.place == "stages.tune.decoder.context"
    heads = Tune.model_validate({"connector": {"kind": "resampler", "heads": 7}})
    with pytest.raises(ConfigError) as caught:
        heads.estimate(MACHINE, {"data": DATA})
    assert caught.value.place == "stages.tune.connector"


def test_a_connector_beside_a_new_decoder_learns() -> None:
    new = {"decoder": {"kind": "new", "d": 64}}
    assert Tune.model_validate(new).adapt.lr_connector == 0.0
    assert Tune.model_validate(new | {"connector": {"kind": "mlp"}}).adapt.lr_connector > 0


def test_a_new_decoder_is_trained_as_a_whole() -> None:
    stage = Tune.model_validate({"decoder": {"kind": "new", "model_type": "qwen2", "d": 64, "depth": 2, "heads": 4}})
    assert (stage.adapt.rank, stage.frozen.steps) == (0, 0)
    found = stage.estimate(MACHINE, {"data": DATA})
    assert found.params_trainable > 49_152 * 64
    assert found.params_frozen == needs.IMAGE_WEIGHTS


@pytest.mark.real
def test_the_decoder_is_the_real_one(packages: Callable[[str], Path]) -> None:
    from plait.assembly.smollm import load_smollm
    from plait.training.cost import SMOLLM2_135M

    packages("smollm2")
    decoder = load_smollm(dtype="bfloat16").model
    assert sum(weight.numel() for weight in decoder.parameters()) == SMOLLM2_135M.params
