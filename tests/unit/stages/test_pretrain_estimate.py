from __future__ import annotations

import subprocess
import sys

import pytest

from plait.core.estimate import Estimate, Machine
from plait.stages.pretrain import Pretrain, SpokenNames

MACHINE = Machine(
    cores=2, memory_bytes=8 * 2**30, disk_bytes=50 * 2**30, gemm_fp32=2.8e11, gemm_bf16=1.3e12, measured=True
)
DATA = Estimate(stage="data", samples={"train": 1127, "test-concept": 200, "test-style": 200, "test-both": 200})


def test_importing_the_settings_loads_no_torch():
    code = "import sys, plait.stages.pretrain; print('torch' in sys.modules, 'transformers' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False"]


def test_weights_are_those_of_the_heads():
    from plait.models.dual import DualEncoder
    from plait.models.heads import ProjectionHead

    heads = [ProjectionHead(width, 1024, 512) for width in (1280, 384)]
    expected = sum(p.numel() for p in DualEncoder(*heads).parameters())
    assert Pretrain().estimate(MACHINE, {"data": DATA}).params_trainable == expected


def test_more_of_anything_costs_more():
    base = Pretrain().estimate(MACHINE, {"data": DATA})
    assert base.seconds[0] < base.seconds[1]
    assert set(base.samples) == {"train", "test-concept", "test-style", "test-both"}
    larger = Pretrain(resolution=224).estimate(MACHINE, {"data": DATA})
    assert larger.image_tokens > base.image_tokens
    assert larger.seconds[1] > base.seconds[1]
    assert Pretrain(epochs=60).estimate(MACHINE, {"data": DATA}).flops > base.flops
    wider = Pretrain(d_hidden=2048).estimate(MACHINE, {"data": DATA})
    assert sum(wider.memory.values()) > sum(base.memory.values())
    assert wider.disk_bytes > base.disk_bytes


def test_names_said_aloud_cost_a_head_and_their_sounds():
    from plait.models.heads import ProjectionHead
    from plait.stages.pretraining import hearing_needs as needs

    base = Pretrain().estimate(MACHINE, {"data": DATA})
    hearing = Pretrain(spoken=SpokenNames(takes=2)).estimate(MACHINE, {"data": DATA})
    head = sum(p.numel() for p in ProjectionHead(needs.AUDIO_WIDTH, 1024, 512).parameters())
    assert hearing.params_trainable == base.params_trainable + head
    assert hearing.params_frozen == base.params_frozen + needs.AUDIO_WEIGHTS
    assert hearing.seconds[1] > base.seconds[1]
    assert any("2,854 sounds" in note for note in hearing.notes)  # 1,127 twice, 600 once
    more = Pretrain(spoken=SpokenNames(takes=3)).estimate(MACHINE, {"data": DATA})
    assert more.home_bytes > hearing.home_bytes > base.home_bytes


def test_checkpoints_beside_training_hold_a_copy_of_all_heads():
    """Weights and two moments of each trained number, the third head's, too."""
    for spoken in (None, SpokenNames()):
        within, beside = (
            Pretrain(spoken=spoken, trainer=Pretrain().trainer.model_copy(update={"async_save": on})).estimate(
                MACHINE, {"data": DATA}
            )
            for on in (False, True)
        )
        copy = beside.moments["training"] - within.moments["training"]
        assert copy == pytest.approx(12 * within.params_trainable, abs=2)


def test_the_audio_tower_has_the_size_of_whisper_tiny():
    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from plait.stages.pretraining import hearing_needs as needs

    sizes = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
    with torch.device("meta"):
        encoder = WhisperEncoder(WhisperConfig(**sizes))  # OpenAI's table of sizes, arXiv 2212.04356
    assert sum(p.numel() for p in encoder.parameters()) == needs.AUDIO_WEIGHTS


@pytest.mark.real
def test_tower_sizes_are_the_real_ones(packages):
    from plait.assembly.towers import load_text_tower
    from plait.models.towers.convnet import EfficientNetLite
    from plait.stages.pretraining import needs, text_needs

    packages("minilm")
    encoder = load_text_tower("minilm").encoder
    assert (encoder.d_out, sum(p.numel() for p in encoder.parameters())) == (
        text_needs.TEXT_WIDTH,
        text_needs.TEXT_WEIGHTS,
    )
    tower = EfficientNetLite()
    assert (tower.d_out, sum(p.numel() for p in tower.parameters())) == (needs.IMAGE_WIDTH, needs.IMAGE_WEIGHTS)
