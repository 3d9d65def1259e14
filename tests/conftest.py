"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "2")

# What a hooked module imports first (torch, transformers) is compiled under the hook's own cache tag. Where the machine
# forbids writing bytecode, that would be 20 s of compiling in every test process instead of in the first one.
sys.dont_write_bytecode = False

# A shell that starts a test run in the background lets it ignore Ctrl-C, and every process that a test starts would
# inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine may take a second for what takes a millisecond: no test is about that unless it says so.
settings.register_profile("plait", deadline=None)
settings.load_profile("plait")

# Shapes in signatures are checked while testing, and only then.
install_import_hook("plait", "beartype.beartype")


@pytest.fixture(scope="session")
def packages() -> Callable[[str], Path]:
    """Folder of a fetched package by name; fails with the command that fetches it when it is missing."""
    from plait.core.packages import locate

    return locate


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders of tiny models with random weights: ``image``, ``text``, ``decoder``."""
    root = tmp_path_factory.mktemp("tiny")
    for name, write in (("image", _write_tower), ("text", _write_text_tower), ("decoder", write_decoder)):
        (root / name).mkdir()
        write(root / name)
    return {name: root / name for name in ("image", "text", "decoder")}


@pytest.fixture
def tiny_model(tiny_folders: dict[str, Path]) -> Any:
    """A fresh ``Multimodal`` on the tiny folders, in eval mode: pictures of 32 pixels become 12 tokens."""
    import torch

    from plait.assembly.language import load_language
    from plait.assembly.multimodal import build_multimodal
    from plait.assembly.towers import load_image_tower
    from plait.models import specs
    from plait.models.composition import Connectors, PretrainedDecoder

    image = load_image_tower(str(tiny_folders["image"]), dtype="float32")
    name = str(tiny_folders["decoder"])
    language = load_language(name, dtype="float32")
    torch.manual_seed(1)
    built = build_multimodal(
        {"image": image},
        language,
        Connectors(image=specs.Words(shuffle=2, d_hidden=24, tokens=3, free=1)),
        decoder=PretrainedDecoder(name=name),
        words=(torch.randn(7, 32) * 0.2, torch.eye(32)),
    )
    built.model.eval()
    return built


def _write_tower(folder: Path) -> None:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def _write_text_tower(folder: Path) -> None:
    """A BERT of one layer and 32 positions that reads letters and figures."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=len(vocabulary), max_position_embeddings=32)).save_pretrained(folder)


def write_decoder(folder: Path) -> None:
    """A Llama of two layers that reads bytes, with ChatML."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
