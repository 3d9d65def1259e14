"""Makes what both sides of ``sft_vs_trl.py`` start from: one LLaVA model with random weights, pictures, questions.

Run: ``python benchmarks/sides/sft_work.py job.json``. The folder ``work`` then holds ``llava/`` (model and processor as
Hugging Face writes them, for the peer), the same weights as ``tower/``, ``decoder/`` and ``connector.safetensors`` (for
Plait), ``pictures/`` and ``data.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from measure import read_job, write_result
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from plait.assembly.smollm import smollm_folder

SIDE, PATCH = 224, 32
IMAGE = "<image>"
PICTURE = 336  # pixels a side of the files: both sides scale them down

# ChatML whose last token is the end of the turn, so that both sides train the same tokens: a line end after it would be
# part of TRL's completion, not of an assistant's turn. Contents are texts, or lists of parts as processors want them.
TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)

COLORS = ("red", "green", "blue", "brown", "purple", "black")
SHAPES = ("circle", "square", "triangle")
GROUNDS = {"white": "#ffffff", "gray": "#c8c8c8", "yellow": "#fff3b0"}


def write_model(work: Path) -> dict[str, Any]:
    """The model, whole and in parts; bfloat16. Returns what it is."""
    tokenizer = AutoTokenizer.from_pretrained(smollm_folder(), local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = TEMPLATE
    # Published shapes: CLIP ViT-B/32's defaults in transformers; SmolLM2-135M with one more row for the image token.
    vision = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        initializer_range=0.041666666666666664,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokens = (SIDE // PATCH) ** 2
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=tokens,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    pictures = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
    model.save_pretrained(work / "llava")
    processor.save_pretrained(work / "llava")
    _write_parts(model, work, tokenizer=tokenizer, pictures=pictures)
    counts = {
        "tower": model.model.vision_tower,
        "connector": model.model.multi_modal_projector,
        "decoder": model.model.language_model,
    }
    return {name: sum(w.numel() for w in part.parameters()) for name, part in counts.items()} | {"image_tokens": tokens}


def _write_parts(model: Any, work: Path, *, tokenizer: Any, pictures: Any) -> None:
    model.model.vision_tower.save_pretrained(work / "tower")
    settings = {
        "image_mean": list(pictures.image_mean),
        "image_std": list(pictures.image_std),
        "resample": 3,
        "size": {"height": SIDE, "width": SIDE},
    }
    (work / "tower" / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with torch.device("meta"):
        decoder = LlamaForCausalLM(model.config.text_config)
    state = {f"model.{name}": value for name, value in model.model.language_model.state_dict().items()}
    decoder.load_state_dict(state | {"lm_head.weight": model.lm_head.weight}, assign=True)
    decoder.tie_weights()
    decoder.save_pretrained(work / "decoder")
    tokenizer.save_pretrained(work / "decoder")
    projector = model.model.multi_modal_projector.state_dict()
    names = {"linear_1": "up", "linear_2": "down"}
    state = {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v.contiguous() for k, v in projector.items()}
    save_file(state, work / "connector.safetensors")


def write_data(work: Path, count: int, *, seed: int = 0) -> None:
    """Pictures of one to five shapes, one question each; three kinds of question in turn, answers of 1 to 30 words."""
    (work / "pictures").mkdir(exist_ok=True)
    draw = random.Random(seed)
    with (work / "data.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            ground = draw.choice(sorted(GROUNDS))
            things = [f"{draw.choice(COLORS)} {draw.choice(SHAPES)}" for _ in range(draw.randint(1, 5))]
            path = Path("pictures") / f"{number:05d}.png"
            _picture(ground, things, draw).save(work / path)
            asked = draw.choice(things) if draw.random() < 0.5 else f"{draw.choice(COLORS)} {draw.choice(SHAPES)}"
            question, answer = question_about(number % 3, ground, things=things, asked=asked)
            sha256 = hashlib.sha256((work / path).read_bytes()).hexdigest()
            record = {"picture": path.as_posix(), "sha256": sha256, "question": question, "answer": answer}
            file.write(json.dumps(record) + "\n")


def question_about(kind: int, ground: str, *, things: list[str], asked: str) -> tuple[str, str]:
    """Question and answer.

    Args:
        kind: 0 asks for things, 1 for one of them, 2 for a description.
        ground: Color of the ground.
        things: Color and shape of each, from left to right.
        asked: What kind 1 asks for.
    """
    if kind == 0:
        return "What is in the picture?", ", ".join(things).capitalize() + "."
    if kind == 1:
        return f"Is there a {asked} in the picture? Answer with yes or no.", "Yes." if asked in things else "No."
    listed = ", then ".join(f"a {thing}" for thing in things)
    return "Describe the picture in one sentence.", f"From left to right there is {listed}, all on a {ground} ground."


def _picture(ground: str, things: list[str], draw: random.Random) -> Image.Image:
    picture = Image.new("RGB", (PICTURE, PICTURE), GROUNDS[ground])
    pen = ImageDraw.Draw(picture)
    width = PICTURE // len(things)
    for number, thing in enumerate(things):
        color, shape = thing.split()
        size = draw.randint(width // 2, width - 4)
        x = number * width + draw.randint(0, width - size)
        y = draw.randint(0, PICTURE - size)
        if shape == "circle":
            pen.ellipse((x, y, x + size, y + size), fill=color)
        elif shape == "square":
            pen.rectangle((x, y, x + size, y + size), fill=color)
        else:
            pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=color)
    return picture


def main() -> None:
    job = read_job()
    work = Path(job["work"])
    weights = write_model(work)
    write_data(work, job["samples"])
    write_result(job, weights)


if __name__ == "__main__":
    main()
