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


def llava(folder: Path) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = tokenizer("words", {"image_token": "<image>"}, eos="</s>", bos="<s>", adds=True)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SQUARE),
        text_config=LlamaConfig(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id, pad_token_id=None),
        image_token_index=words.image_token_id,
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
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    save(folder, LlavaForConditionalGeneration(config), processor)


def idefics3(folder: Path, kind: str = "Idefics3") -> Any:
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


def smolvlm(folder: Path) -> Any:
    idefics3(folder, "SmolVLM")


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


BUILDERS: dict[str, Callable[[Path], Any]] = {
    "llava": llava,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
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
