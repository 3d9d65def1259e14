"""Tiny towers of every family of transformers, as folders: of pictures, and some of sounds and videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)
VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"image_size": 32, "patch_size": 8}
NAFLEX = {key: value for key, value in VIT.items() if key != "image_size"} | {"num_patches": 16}
STAGES = {"hidden_sizes": [8, 12, 16], "depths": [1, 1, 1]}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 40, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

TOWERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", VIT),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", VIT),
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", NAFLEX),
    "aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig", VIT),
    "aimv2-native": ("Aimv2VisionModel", "Aimv2VisionConfig", VIT | {"is_native": True}),
    "mlcd": ("MLCDVisionModel", "MLCDVisionConfig", VIT | {"num_key_value_groups": 1}),
    "pixtral": ("PixtralVisionModel", "PixtralVisionConfig", VIT),
    "vit": ("ViTModel", "ViTConfig", VIT),
    "deit": ("DeiTModel", "DeiTConfig", VIT),
    "vit_mae": ("ViTMAEModel", "ViTMAEConfig", VIT),
    "vit_msn": ("ViTMSNModel", "ViTMSNConfig", VIT),
    "ijepa": ("IJepaModel", "IJepaConfig", VIT),
    "beit": (
        "BeitModel",
        "BeitConfig",
        VIT | {"use_absolute_position_embeddings": True, "use_relative_position_bias": True},
    ),
    "beit-shared": ("BeitModel", "BeitConfig", VIT | {"use_shared_relative_position_bias": True}),
    "data2vec": ("Data2VecVisionModel", "Data2VecVisionConfig", VIT | {"use_relative_position_bias": True}),
    "dinov2": ("Dinov2Model", "Dinov2Config", VIT | {"mlp_ratio": 2}),
    "dinov2-registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        VIT | {"mlp_ratio": 2, "num_register_tokens": 3},
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", VIT | {"num_register_tokens": 3}),
    "dinov3-convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", STAGES),
    "convnext": ("ConvNextModel", "ConvNextConfig", STAGES | {"num_stages": 3, "image_size": 32}),
    "convnextv2": ("ConvNextV2Model", "ConvNextV2Config", STAGES | {"num_stages": 3, "image_size": 32}),
    "swin": ("SwinModel", "SwinConfig", SWIN),
    "swin-absolute": ("SwinModel", "SwinConfig", SWIN | {"use_absolute_embeddings": True}),
    "swinv2": ("Swinv2Model", "Swinv2Config", SWIN),
    "resnet": ("ResNetModel", "ResNetConfig", STAGES | {"embedding_size": 8}),
    "resnet-v15": (
        "ResNetModel",
        "ResNetConfig",
        STAGES | {"embedding_size": 8, "downsample_in_first_stage": True, "layer_type": "basic"},
    ),
    "regnet": ("RegNetModel", "RegNetConfig", STAGES | {"embedding_size": 8, "groups_width": 4}),
    "dual-clip": ("CLIPModel", "CLIPConfig", {"vision_config": VIT, "text_config": TEXT}),
    "dual-metaclip_2": ("MetaClip2Model", "MetaClip2Config", {"vision_config": VIT, "text_config": TEXT}),
    "dual-siglip": ("SiglipModel", "SiglipConfig", {"vision_config": VIT, "text_config": TEXT}),
    "dual-siglip2": ("Siglip2Model", "Siglip2Config", {"vision_config": NAFLEX, "text_config": TEXT}),
    "dual-aimv2": ("Aimv2Model", "Aimv2Config", {"vision_config": VIT, "text_config": TEXT}),
}
"""Class, configuration class and settings of tiny towers; pictures of 32 pixels, patches of 8."""


_SPEECH = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_SPEECH |= {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
_WHISPER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 20}
_WHISPER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 80}
_WHISPER |= {"max_source_positions": 50, "max_target_positions": 6, "pad_token_id": 0, "bos_token_id": 1}
_WHISPER |= {"eos_token_id": 2, "decoder_start_token_id": 3}

HEARS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whisper": ("WhisperModel", "WhisperConfig", _WHISPER),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", _SPEECH),
    "hubert": ("HubertModel", "HubertConfig", _SPEECH),
}
"""Likewise of sounds; Whisper hears windows of 1 s."""

WATCHES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "videomae": ("VideoMAEModel", "VideoMAEConfig", VIT | {"patch_size": 16, "num_frames": 4}),
}
"""Likewise of videos: clips of 4 frames of 32 pixels."""

_ALL = TOWERS | HEARS | WATCHES


class TinyTowers:
    """Folders of tiny towers with random weights, made when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, name: str) -> Path:
        """Weights, configuration and preprocessing of one of :data:`TOWERS`, :data:`HEARS` and :data:`WATCHES`."""
        path = self.root / name
        if not path.exists():
            self.write(self.make(name), path)
        return path

    def make(self, name: str, model: str = "", **changes: Any) -> Any:
        """A model, all its weights random, also those that start at 0 or 1; batch norms as after training."""
        import transformers

        own, config, settings = _ALL[name]
        torch.manual_seed(0)
        # Some configurations change what they are given.
        given = json.loads(json.dumps(settings | changes))
        made = getattr(transformers, model or own)(getattr(transformers, config)(**given))
        for weight in made.parameters():
            weight.data += 0.2 * torch.randn_like(weight)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
        return made.eval()

    def write(self, model: Any, path: Path) -> None:
        """A folder as it is published."""
        model.save_pretrained(path)
        if path.name in HEARS:
            from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

            hears = WhisperFeatureExtractor(chunk_length=1) if path.name == "whisper" else Wav2Vec2FeatureExtractor()
            hears.save_pretrained(path)
            return
        settings = {"image_mean": MEAN, "image_std": STD, "resample": 3, "size": {"height": 32, "width": 32}}
        (path / "preprocessor_config.json").write_text(json.dumps(settings))

    def theirs(self, name: str) -> Any:
        """The family's own class, from the folder."""
        import transformers

        return getattr(transformers, _ALL[name][0]).from_pretrained(self.folder(name)).eval()

    def model_type(self, name: str) -> str:
        """As its configuration says it."""
        import transformers

        return getattr(transformers, _ALL[name][1]).model_type
