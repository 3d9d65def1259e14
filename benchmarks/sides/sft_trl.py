"""The peer's side of ``sft_vs_trl.py``: TRL's SFTTrainer with PEFT. Runs in an environment of its own, without Plait.

Run: ``python benchmarks/sides/sft_trl.py job.json``.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from measure import Start, read_job, read_questions, write_result
from peft import LoraConfig
from transformers import AutoProcessor, LlavaForConditionalGeneration
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


def make_trainer(model: Any, processor: Any, job: dict[str, Any]) -> SFTTrainer:
    """The trainer on the benchmark's data, set to do what Plait's side does."""
    work, peer = Path(job["work"]), job["peer"]
    records = [
        {
            "prompt": [{"role": "user", "content": record["question"]}],
            "completion": [{"role": "assistant", "content": record["answer"]}],
            "images": [str(work / record["picture"])],
        }
        for record in read_questions(job)
    ]
    data = Dataset.from_list(records).cast_column("images", List(Image()))
    args = SFTConfig(
        output_dir=str(work / "trl"),
        use_cpu=True,
        bf16=peer["autocast"],
        num_train_epochs=job["epochs"],
        per_device_train_batch_size=peer["micro_batch"],
        gradient_accumulation_steps=job["batch_size"] // peer["micro_batch"],
        gradient_checkpointing=False,
        learning_rate=job["lr"],
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        seed=job["seed"],
        max_length=None,
        pad_to_multiple_of=None,
        completion_only_loss=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        # The tower has layers of the same names; only the decoder's are adapted.
        target_modules=rf".*language_model.*\.({'|'.join(job['targets'])})",
        modules_to_save=["multi_modal_projector"],
    )
    return SFTTrainer(model, args=args, train_dataset=data, processing_class=processor, peft_config=lora)


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
        "loss": losses[-1],
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
        with torch.no_grad(), trainer.compute_loss_context_manager():
            total += float(trainer.compute_loss(trainer.model, batch)) * count
    return {"loss": total / trained, "tokens": tokens, "trained": trained}


def main() -> None:
    job = read_job()
    write_result(job, check(job) if job["check"] else train(job))


if __name__ == "__main__":
    main()
