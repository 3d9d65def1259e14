"""The peers' side of ``sft_vs_trl.py``: TRL's SFTTrainer or transformers' Trainer, with PEFT. Without Plait.

Runs in an environment of its own: ``python benchmarks/sides/sft_trl.py job.json``.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from measure import Start, read_job, read_questions, write_result
from peft import LoraConfig, get_peft_model
from PIL import Image as Pictures
from start import start_adapters
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

PACKAGES = ("trl", "peft", "transformers", "accelerate", "datasets", "torch")


def load(work: Path, peer: dict[str, Any]) -> tuple[Any, Any]:
    """Model and processor."""
    model = LlavaForConditionalGeneration.from_pretrained(
        work / "llava",
        dtype=peer["weights"],
        attn_implementation=peer["attention"],
        local_files_only=True,
        use_safetensors=True,
    )
    return model, AutoProcessor.from_pretrained(work / "llava", local_files_only=True)


def make_trainer(model: Any, processor: Any, job: dict[str, Any]) -> Trainer:
    """The trainer on the benchmark's data in Plait's order, set to do what Plait's side does."""
    return (_hf if job["peer"]["program"] == "hf" else _trl)(model, processor, job)


def _arguments(job: dict[str, Any]) -> dict[str, Any]:
    peer = job["peer"]
    return {
        "output_dir": str(Path(job["work"]) / "peer"),
        "use_cpu": True,
        "bf16": peer["autocast"],
        "num_train_epochs": 1,  # the records are those of all epochs, in order
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": peer["micro_batch"],
        "gradient_accumulation_steps": job["batch_size"] // peer["micro_batch"],
        "gradient_checkpointing": peer.get("recompute", False),
        "learning_rate": job["lr"],
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "seed": job["seed"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _lora(job: dict[str, Any]) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        # The tower has layers of the same names; only the decoder's are adapted.
        target_modules=rf".*language_model.*\.({'|'.join(job['targets'])})",
        modules_to_save=["multi_modal_projector"],
    )


def _trl(model: Any, processor: Any, job: dict[str, Any]) -> SFTTrainer:
    work = Path(job["work"])
    records = [
        {
            "prompt": [{"role": "user", "content": record["question"]}],
            "completion": [{"role": "assistant", "content": record["answer"]}],
            "images": [str(work / record["picture"])],
        }
        for record in read_questions(job)
    ]
    data = Dataset.from_list(records).cast_column("images", List(Image()))
    args = SFTConfig(**_arguments(job), max_length=None, pad_to_multiple_of=None, completion_only_loss=True)
    trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=processor, peft_config=_lora(job))
    start_adapters(trainer.model)
    return trainer


class _Answers:
    """Collator for transformers' Trainer: chat template, pictures and padding by the processor; answers are trained."""

    def __init__(self, processor: Any, work: Path, *, multiple: int | None) -> None:
        self.processor, self.work, self.multiple = processor, work, multiple
        self.end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.begin = processor.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]

    def __call__(self, records: list[dict[str, str]]) -> dict[str, Any]:
        texts, pictures = [], []
        for record in records:
            asked = [{"type": "image"}, {"type": "text", "text": record["question"]}]
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": record["answer"]}]
            texts.append(self.processor.apply_chat_template(turns))
            pictures.append(Pictures.open(self.work / record["picture"]).convert("RGB"))
        batch = self.processor(
            text=texts, images=pictures, padding=True, pad_to_multiple_of=self.multiple, return_tensors="pt"
        )
        labels = torch.full_like(batch["input_ids"], -100)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            at = next(i for i in range(len(ids)) if ids[i : i + len(self.begin)] == self.begin) + len(self.begin)
            stop = ids.index(self.end, at) + 1
            labels[row, at:stop] = batch["input_ids"][row, at:stop]
        return dict(batch) | {"labels": labels}


def _hf(model: Any, processor: Any, job: dict[str, Any]) -> Trainer:
    args = TrainingArguments(**_arguments(job), remove_unused_columns=False)
    if job["peer"].get("recompute"):
        model.enable_input_require_grads()
    adapted = get_peft_model(model, _lora(job))
    start_adapters(adapted)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    collator = _Answers(processor, Path(job["work"]), multiple=job["peer"].get("multiple"))
    return Trainer(adapted, args=args, train_dataset=read_questions(job), data_collator=collator)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One run, measured from the loaded model to the last update; nothing is saved."""
    model, processor = load(Path(job["work"]), job["peer"])
    start = Start.now(model.parameters())
    trainer = make_trainer(model, processor, job)
    trainer.train()
    measured = start.stop()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return measured | {
        "steps": trainer.state.global_step,
        "trainable": sum(w.numel() for w in trainer.model.parameters() if w.requires_grad),
        "losses": losses,
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens of one epoch, and the loss on them before any update."""
    model, processor = load(Path(job["work"]), job["peer"])
    trainer = make_trainer(model, processor, job)
    trainer.model.eval()
    total = 0.0
    tokens = trained = 0
    for batch in trainer.get_train_dataloader():
        count = int((batch["labels"][:, 1:] != -100).sum())
        tokens += int(batch["attention_mask"].sum())
        trained += count
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=job["peer"]["autocast"]):
            total += float(trainer.compute_loss(trainer.model, batch)) * count
    return {"loss": total / trained, "tokens": tokens, "trained": trained}


def main() -> None:
    job = read_job()
    write_result(job, check(job) if job["check"] else train(job))


if __name__ == "__main__":
    main()
