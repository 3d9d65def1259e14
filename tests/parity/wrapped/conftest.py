"""Tiny vision-language models of every family, saved in the hub's layout: random weights, tokenizer, processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CORPUS = [
    "User: what is in the picture? Assistant: a small red cat and two dogs on a mat.",
    "USER: how many cats are there ASSISTANT: three cats, one of them is black. system helpful",
    "<|im_start|>user describe this image in one word <|im_end|> model answers: yes, no, left, right.\n\n",
]
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "attention_dropout": 0.0}
SQUARE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
SQUARE |= {"image_size": 32, "patch_size": 8}
NORM = {"image_mean": [0.48, 0.45, 0.40], "image_std": [0.26, 0.25, 0.27]}

IM = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ 'PICTURE' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML with pictures in place, as the Qwen family writes it."""


def tokenizer(
    style: str, named: dict[str, str], *, eos: str, bos: str = "", more: tuple[str, ...] = (), adds: bool = False
) -> Any:
    """A tokenizer trained on :data:`CORPUS`.

    Args:
        style: ``bytes`` (GPT-2's and Qwen's kind) or ``words`` (LLaMA's and Gemma's: spaces are part of words).
        named: Special tokens by their name in the processor, such as ``image_token``.
        eos: Ends a turn.
        bos: Begins a text.
        more: Further special tokens.
        adds: Whether it puts ``bos`` in front.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if style == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        if style == "words":
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            core.normalizer = normalizers.Replace(" ", "▁")
        core.decoder = decoders.Metaspace()
        alphabet = [chr(c) for c in range(33, 127)] + ["\n", "▁", "\n\n", "\n\n\n"]
    special = [t for t in ("<unk>", bos, eos) if t]
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=special)
    core.train_from_iterator(CORPUS * 20, trainer)
    if adds:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    found = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token=eos,
        bos_token=bos or None,
        extra_special_tokens=named,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    found.add_tokens(list(more), special_tokens=True)
    return found


def llava(folder: Path, *, tower: str = "CLIP") -> None:
    import transformers
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = tokenizer("words", {"image_token": "<image>"}, eos="</s>", bos="<s>", adds=True)
    config = LlavaConfig(
        vision_config=getattr(transformers, f"{tower}VisionConfig")(**SQUARE),
        text_config=LlamaConfig(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id, pad_token_id=None),
        image_token_index=words.image_token_id,
        vision_feature_select_strategy="default" if tower == "CLIP" else "full",
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True, **NORM
    )
    template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
        "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}"
        "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    processor = LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default" if tower == "CLIP" else "full",
        num_additional_image_tokens=1 if tower == "CLIP" else 0,
        chat_template=template,
    )
    save(folder, LlavaForConditionalGeneration(config), processor)


def llava_siglip(folder: Path) -> None:
    llava(folder, tower="Siglip")


def idefics3(folder: Path, kind: str = "Idefics3") -> None:
    import transformers
    from transformers import Idefics3Processor, LlamaConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    cells = tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
    words = tokenizer(
        "bytes",
        {"image_token": "<image>"},
        eos="<end_of_utterance>",
        bos="<|im_start|>",
        more=("<fake_token_around_image>", "<global-img>", *cells),
    )
    vision = getattr(transformers, f"{kind}VisionConfig")(**SQUARE)
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id, pad_token_id=None),
        image_token_id=words.image_token_id,
        pad_token_id=None,
        scale_factor=2,
    )
    reader = Idefics3ImageProcessorPil if kind == "Idefics3" else SmolVLMImageProcessorPil
    images = reader(size={"longest_edge": 128}, max_image_size={"longest_edge": 32}, **NORM)
    template = (
        "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
        "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
        "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}{{ '<image>' }}{% endif %}"
        "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    processor = Idefics3Processor(images, words, image_seq_len=4, chat_template=template)
    save(folder, getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor)


def smolvlm(folder: Path) -> None:
    idefics3(folder, "SmolVLM")


def qwen(kind: str) -> Callable[[Path], None]:
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL."""

    def build(folder: Path) -> None:
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        from plait.assembly.vlm import without_videos

        named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
        ends = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>")
        words = tokenizer("bytes", named, eos="<|im_end|>", more=ends)
        vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
        if kind == "Qwen2VL":
            vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        else:
            vision |= {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
        if kind == "Qwen2_5_VL":
            vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        if kind == "Qwen3VL":
            vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        rope: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        rope |= {"mrope_interleaved": True} if kind == "Qwen3VL" else {}
        text = {**TEXT, "vocab_size": len(words), "rope_parameters": rope, "eos_token_id": words.eos_token_id}
        text |= {"head_dim": 8} if kind == "Qwen3VL" else {"bos_token_id": None}
        ids = {f"vision_{end}_token_id": words.convert_tokens_to_ids(f"<|vision_{end}|>") for end in ("start", "end")}
        config = getattr(transformers, f"{kind}Config")(
            text_config=text,
            vision_config=vision,
            image_token_id=words.image_token_id,
            video_token_id=words.video_token_id,
            **ids,
        )
        images = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 4096}, **NORM
        )
        template = IM.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>")
        processor = without_videos(getattr(transformers, f"{kind}Processor"))(images, words, chat_template=template)
        save(folder, getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor)

    return build


def internvl(folder: Path) -> None:
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    from plait.assembly.vlm import without_videos

    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = tokenizer("bytes", {**named, "video_token": "<video>"}, eos="<|im_end|>", more=("<|im_start|>",))
    sizes = {**SQUARE, "image_size": [32, 32], "patch_size": [8, 8]}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**sizes),
        text_config=Qwen2Config(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id, bos_token_id=None),
        image_token_id=words.context_image_token_id,
        image_seq_length=4,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=6, **NORM)
    template = IM.replace("PICTURE", "<IMG_CONTEXT>\n")
    processor = without_videos(InternVLProcessor)(
        images, words, video_processor=None, image_seq_length=4, chat_template=template
    )
    save(folder, InternVLForConditionalGeneration(config), processor)


def onevision(folder: Path) -> None:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    from plait.assembly.vlm import without_videos

    named = {"image_token": "<image>", "video_token": "<video>"}
    words = tokenizer("bytes", named, eos="<|im_end|>", more=("<|im_start|>",))
    points = [[32 * a, 32 * b] for a in range(1, 5) for b in range(1, 5)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**SQUARE, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id, bos_token_id=None),
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_grid_pinpoints=points,
        vision_aspect_ratio="anyres_max_4",
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=points, **NORM)
    processor = without_videos(LlavaOnevisionProcessor)(
        images,
        words,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=IM.replace("PICTURE", "<image>\n"),
    )
    save(folder, LlavaOnevisionForConditionalGeneration(config), processor)


def gemma3(folder: Path) -> None:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer("gemma", named, eos="<eos>", bos="<bos>", more=("<start_of_turn>", "<end_of_turn>"), adds=True)
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**SQUARE, vision_use_head=False),
        text_config=Gemma3TextConfig(
            **TEXT,
            head_dim=8,
            vocab_size=len(words),
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
            eos_token_id=words.eos_token_id,
            bos_token_id=words.bos_token_id,
            final_logit_softcapping=None,
        ),
        mm_tokens_per_image=4,
        image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, **NORM)
    template = (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set first = messages[0]['content'][0]['text'] + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
        "{{ first if loop.first else '' }}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}"
        "{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )
    processor = Gemma3Processor(images, words, image_seq_length=4, chat_template=template)
    model = Gemma3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = [words.eos_token_id, words.convert_tokens_to_ids("<end_of_turn>")]
    save(folder, model, processor)


def paligemma(folder: Path, version: int = 1) -> None:
    from transformers import (
        Gemma2Config,
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipVisionConfig,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = tokenizer("gemma", {"image_token": "<image>"}, eos="<eos>", bos="<bos>")
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32}, **NORM)
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, words)
    text: dict[str, Any] = {**TEXT, "head_dim": 8, "vocab_size": len(words)}
    text |= {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id}
    second = {"sliding_window": 24, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**SQUARE, vision_use_head=False),
        text_config=GemmaConfig(**text) if version == 1 else Gemma2Config(**text, **second),
        image_token_index=words.image_token_id,
        projection_dim=32,
    )
    save(folder, PaliGemmaForConditionalGeneration(config), processor)


def paligemma2(folder: Path) -> None:
    """With layers that look back 24 tokens, and scores that are capped."""
    paligemma(folder, version=2)


def blip2(folder: Path) -> None:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    words = tokenizer("bytes", {}, eos="<eos>", bos="</s>", adds=True)
    images = BlipImageProcessorPil(size={"height": 32, "width": 32}, **NORM)
    processor = Blip2Processor(images, words, num_query_tokens=4)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**SQUARE).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, encoder_hidden_size=16
        ).to_dict(),
        text_config=OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=4096,
            word_embed_proj_dim=32,
            dropout=0.0,
            vocab_size=len(words),
            eos_token_id=words.eos_token_id,
            bos_token_id=words.bos_token_id,
            pad_token_id=words.pad_token_id,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    save(folder, Blip2ForConditionalGeneration(config), processor)


def save(folder: Path, model: Any, processor: Any) -> None:
    """Weights drawn wide enough that logits tell positions and pictures apart."""
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or "newline" in name or "class_embedding" in name:
            torch.nn.init.normal_(weight, std=0.25)
        elif "norm" not in name.lower():
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "llava": llava,
    "llava-siglip": llava_siglip,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen2_vl": qwen("Qwen2VL"),
    "qwen2_5_vl": qwen("Qwen2_5_VL"),
    "qwen3_vl": qwen("Qwen3VL"),
    "internvl": internvl,
    "llava_onevision": onevision,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "paligemma2": paligemma2,
    "blip-2": blip2,
}


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a family, made when it is first asked for."""
    root = tmp_path_factory.mktemp("vlms")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            folder.mkdir()
            torch.manual_seed(0)
            BUILDERS[name](folder)
        return folder

    return make
