"""wav2vec 2.0's pretraining = ``Wav2Vec2ForPreTraining`` with the same weights, mask and wrong answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForPreTraining, Wav2Vec2Config, Wav2Vec2ForPreTraining

from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.tensors import Patches
from plait.models.hub import wav2vec
from plait.models.towers.wav2vec import WAV2VEC_BASE, Wav2Vec
from plait.models.towers.wav2vec_pretraining import SpeechTaskSizes, Wav2VecPretraining
from plait.objectives.speech import code_diversity, masked_contrast, other_steps

CONFIG: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 5,
    "conv_dim": [8, 12, 8], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "num_conv_pos_embedding_groups": 2,
    "num_conv_pos_embeddings": 8, "hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0,
    "final_dropout": 0.0, "feat_proj_dropout": 0.0, "feat_quantizer_dropout": 0.0, "layerdrop": 0.0,
    "mask_feature_prob": 0.0, "num_codevector_groups": 2, "num_codevectors_per_group": 5, "codevector_dim": 12,
    "proj_codevector_dim": 10, "contrastive_logits_temperature": 0.1, "diversity_loss_weight": 0.1,
}  # fmt: skip
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


def stirred(model: nn.Module) -> Any:
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) * 0.3 + (0.5 if weight.ndim == 1 else 0.0)
    return model


def ours_of(config: dict[str, Any], state: dict[str, Tensor]) -> Wav2VecPretraining:
    tower = Wav2Vec(wav2vec.sizes_from(config, normalize=False))
    made = Wav2VecPretraining(tower, wav2vec.pretraining_sizes_from(config))
    made.load_state_dict(wav2vec.pretraining_to_ours(state, tower.sizes))
    return made


def sounds(dtype: torch.dtype) -> tuple[Tensor, Patches]:
    samples = torch.randn(2, 333, generator=torch.Generator().manual_seed(1)).to(dtype)
    return samples, Patches(values=samples.reshape(-1, 1), grid=torch.tensor([[1, 1, 333]] * 2))


@pytest.mark.row("S4-41")
@pytest.mark.parametrize("kind", ["base", "stable"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_losses_and_gradients_are_theirs(as_saved, loaded, kind: str, mode: str):
    more = STABLE if kind == "stable" else {}
    dtype = torch.float64 if mode == "eval" else torch.float32  # their noise is always float32
    values = {"atol": 1e-10, "rtol": 1e-8} if mode == "eval" else {"atol": 1e-5, "rtol": 1e-4}
    near = {"atol": 1e-5, "rtol": 1e-4}  # their loss is always in float32; worst: 2e-6 of the largest
    theirs = stirred(Wav2Vec2ForPreTraining(Wav2Vec2Config(**CONFIG | more)))
    theirs = theirs.to(dtype).train(mode == "train")
    config, state = as_saved(theirs)
    ours = ours_of(config, state).to(dtype).train(mode == "train")
    samples, media = sounds(dtype)
    steps = ours.tower.sizes.frames(333)
    masked = torch.rand(2, steps, generator=torch.Generator().manual_seed(2)) < (0.6 if mode == "eval" else 2.0)
    others = other_steps(
        masked.flatten(), torch.tensor([steps] * 2), count=4, generator=torch.Generator().manual_seed(3)
    )
    place = torch.zeros(2, steps, 4, dtype=torch.long)
    place[masked] = masked.flatten().nonzero()[:, 0][others]
    torch.manual_seed(4)
    wanted = theirs(samples, mask_time_indices=masked, sampled_negative_indices=place)
    torch.manual_seed(4)
    found = ours(media, masked=masked.flatten())
    torch.testing.assert_close(found.predicted, wanted.projected_states[masked], **values)
    torch.testing.assert_close(found.targets, wanted.projected_quantized_states[masked], **values)
    contrast = masked_contrast(found.predicted, found.targets, others, codes=found.codes)
    count = masked.sum().to(dtype)
    diversity = code_diversity(found.probability, count)
    torch.testing.assert_close(contrast, wanted.contrastive_loss.to(dtype), **near)
    torch.testing.assert_close(diversity, wanted.diversity_loss.to(dtype), **near)
    total = ours.sizes.groups * ours.sizes.codes
    torch.testing.assert_close(total * (1 - diversity / count), wanted.codevector_perplexity.to(dtype), **near)
    same = (found.codes[others] == found.codes[:, None]).all(-1)
    assert same.any()  # right answers among the wrong ones are met
    (contrast + 0.1 * diversity).backward()
    wanted.loss.backward()
    gradients = wav2vec.pretraining_to_ours(as_saved(theirs, gradients=True).state, ours.tower.sizes)
    for name, weight in ours.named_parameters():
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(grad, gradients[name], **near, msg=lambda m, name=name: f"{name}: {m}")
    assert bool(gradients["quantizer.score.weight"].any()) == (mode == "train")
    back = loaded(AutoModelForPreTraining, wav2vec.pretraining_config_from(ours.tower.sizes, ours.sizes),
                  wav2vec.pretraining_to_official(ours.state_dict(), ours.tower.sizes))  # fmt: skip
    assert all(torch.equal(value, state[name]) for name, value in as_saved(back).state.items())
    assert wav2vec.pretraining_sizes_from(as_saved(back).config) == ours.sizes


@pytest.mark.row("S4-41")
def test_as_many_weights_as_published():
    with torch.device("meta"):
        ours = Wav2VecPretraining(Wav2Vec(WAV2VEC_BASE), SpeechTaskSizes())
        theirs = Wav2Vec2ForPreTraining(Wav2Vec2Config())
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters() == 95_044_608


@torch.no_grad()
def test_sounds_of_mixed_lengths_are_learned_from_as_they_would_be_alone(as_saved):
    theirs = stirred(Wav2Vec2ForPreTraining(Wav2Vec2Config(**CONFIG))).double()
    ours = ours_of(*as_saved(theirs)).double().eval()
    lengths = [333, 200, 333, 450]
    generator = torch.Generator().manual_seed(0)
    media = Patches(values=torch.randn(sum(lengths), 1, dtype=torch.float64, generator=generator),
                    grid=torch.tensor([[1, 1, n] for n in lengths]))  # fmt: skip
    steps: list[int] = ours.tower.grid_out(media.grid)[:, 2].tolist()
    masked = torch.rand(sum(steps), generator=generator) < 0.5
    found = ours(media, masked=masked)
    alone = [
        ours(Patches(values=part, grid=torch.tensor([[1, 1, len(part)]])), masked=mask)
        for part, mask in zip(media.values.split(lengths), masked.split(steps), strict=True)
    ]
    for got, parts in zip(found[:3], list(zip(*alone, strict=True))[:3], strict=True):
        torch.testing.assert_close(got, torch.cat(parts), atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(found.probability, sum((one.probability for one in alone), torch.zeros(2, 5).double()))
    with pytest.raises(DataError, match=f"mask is of 3 time steps, the sounds have {sum(steps)}"):
        ours(media, masked=masked[:3])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="width of 10 is not 3 equal codes"):
        SpeechTaskSizes(groups=3, d_code=10)
    tower = Wav2Vec(wav2vec.sizes_from(Wav2Vec2Config(**CONFIG | {"mask_time_prob": 0.0}).to_dict()))
    with pytest.raises(ConfigError, match="no vector for masked frames"):
        Wav2VecPretraining(tower, SpeechTaskSizes())
    with pytest.raises(CheckpointError, match="1 names have no place"):
        wav2vec.pretraining_to_ours({"quantizer.extra": torch.zeros(1)}, WAV2VEC_BASE)
