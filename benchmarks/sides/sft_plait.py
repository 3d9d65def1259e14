"""Plait's side of ``sft_vs_trl.py``: the tune stage's pieces, training connector and LoRA on the benchmark's data.

Run: ``python benchmarks/sides/sft_plait.py job.json``.
"""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import Start, read_job, read_questions, write_result
from safetensors.torch import load_file
from start import start_adapters
from torch import nn

from plait import __version__
from plait.adapters.lora import Lora, attach, cast_inputs
from plait.assembly.language import load_language
from plait.assembly.smollm import LanguageModel
from plait.assembly.towers import ImageTower, load_image_tower
from plait.core.device import Compute, seed_everything, setup
from plait.core.events import Events
from plait.core.files import read_jsonl
from plait.core.tensors import IGNORE
from plait.core.types import MediaRef, Sample, Text, Turn
from plait.data.conversations import Conversation, ConversationBatches
from plait.data.features import FeatureStore, FreshFeatures, cached_features
from plait.data.packing import row_length
from plait.data.template import Template
from plait.models.connectors.projection import Mlp
from plait.models.multimodal import MultimodalLM
from plait.objectives.language import NextToken
from plait.training.loop import fit
from plait.training.monitor import METRICS
from plait.training.optim import Rates
from plait.training.precision import autocast
from plait.training.schedule import Cosine
from plait.training.settings import Settings

importlib.import_module("peft")  # before the clock, like the peer's imports: attach would import it

TASK = "question"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The model in its parts."""

    compute: Compute
    image: ImageTower
    language: LanguageModel
    connector: Mlp
    model: MultimodalLM


def load(work: Path, dtype: str) -> Loaded:
    """LLaVA from the folders of its parts; the connector is LLaVA's, which has no norm in front."""
    compute = setup(device="cpu", dtype=dtype)
    image = load_image_tower(str(work / "tower"), dtype=dtype)
    language = load_language(str(work / "decoder"), dtype=dtype)
    connector = Mlp(image.encoder.d_out, language.width, language.width)
    connector.norm = nn.Identity()
    state = load_file(work / "connector.safetensors")
    connector.load_state_dict({name: value.float() for name, value in state.items()})
    encoder = image.encoder
    assert isinstance(encoder, nn.Module)
    model = MultimodalLM(
        {"image": encoder},
        {"image": connector},
        language.model,
        placeholder=max(language.model.config.vocab_size, len(language.tokenizer)),
    )
    return Loaded(compute=compute, image=image, language=language, connector=connector, model=model.eval())


def batches(loaded: Loaded, job: dict[str, Any], cache: Path | None) -> ConversationBatches:
    """Fill the feature cache, render the questions, plan the batches."""
    work = Path(job["work"])
    samples = [_sample(record) for record in read_questions(job)]
    store = _features(loaded.image, [ref for sample in samples for ref in sample.media()], work=work, cache=cache)
    slots = int(loaded.connector.grid_out(store([samples[0].media()[0].sha256]).grid).prod())

    def count(_: MediaRef) -> int:
        return slots

    template = Template(loaded.language.tokenizer, placeholder=loaded.model.placeholder, slots=count)
    stop = loaded.language.tokenizer.eos_token_id
    assert isinstance(stop, int)
    source = ConversationBatches(
        conversations=[Conversation(id=s.id, task=TASK, rendered=template.sample(s)) for s in samples],
        weights={TASK: 1.0},
        stores=[store],
        grid_out=loaded.connector.grid_out,
        batch_size=job["batch_size"],
        row=loaded.language.model.config.max_position_embeddings,
        pad=stop,
        steps=job["epochs"] * len(samples) // job["batch_size"],
        seed=job["seed"],
        pieces=job["batch_size"] // job["peer"]["micro_batch"],
        packed=job.get("plait", {}).get("packing", True),
    )
    return replace(source, row=row_length(source.lengths()))


def _features(image: ImageTower, refs: list[MediaRef], *, work: Path, cache: Path | None) -> FeatureStore:
    def read(ref: MediaRef) -> bytes:
        return (work / ref.uri).read_bytes()

    if cache is None:
        return FreshFeatures(refs, read=read, prepare=image.prepare, encoder=image.encoder)
    return cached_features(
        refs,
        read=read,
        prepare=image.prepare,
        encoder=image.encoder,
        key=image.cache_key,
        folder=cache,
        events=Events(),
    )


def _sample(record: dict[str, str]) -> Sample:
    picture = MediaRef(modality="image", sha256=record["sha256"], uri=record["picture"])
    return Sample(
        id=Path(record["picture"]).stem,
        turns=(
            Turn(role="user", parts=(picture, Text(text=record["question"]))),
            Turn(role="assistant", parts=(Text(text=record["answer"]),), trained=True),
        ),
    )


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One run, measured from the loaded model to the last checkpoint."""
    switched = job.get("plait", {})
    loaded = load(Path(job["work"]), switched.get("dtype", job["dtype"]))
    with tempfile.TemporaryDirectory(dir=job["work"]) as folder:
        start = Start.now(loaded.model.parameters())
        source = batches(loaded, job, Path(folder) / "features" if switched.get("cache", True) else None)
        seed_everything(job["seed"])
        attach(loaded.language.model, Lora(rank=job["rank"], alpha=job["alpha"], targets=tuple(job["targets"])))
        start_adapters(loaded.language.model)
        cast_inputs(loaded.language.model, enabled=loaded.compute.dtype == "float32")  # as the tune stage does
        loaded.connector.requires_grad_(requires_grad=True).train()
        loaded.language.model.train()
        settings = Settings(
            steps=source.steps,
            compute=loaded.compute,
            seed=job["seed"],
            rates=Rates(lr=job["lr"]),
            schedule=Cosine(),
            head=switched.get("head", "fused"),
            recompute=switched.get("recompute", "none"),
            compile=switched.get("compile", False),
        )
        result = fit(loaded.model, NextToken(), source, settings=settings, folder=Path(folder), events=Events())
        measured = start.stop()
        losses = [record["loss"] for record in read_jsonl(Path(folder) / METRICS)]
    (store,) = source.stores
    return measured | {
        "steps": result.step,
        "trainable": sum(w.numel() for w in loaded.model.parameters() if w.requires_grad),
        "losses": losses,
        "skipped": result.skipped,
        "cache_seconds": store.fill.seconds if switched.get("cache", True) else 0.0,
        "threads": torch.get_num_threads(),
        "versions": {"plait": __version__, "torch": torch.__version__},
    }


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens of one epoch, the loss on them before any update, and the order of the samples of all epochs."""
    loaded = load(Path(job["work"]), job["dtype"])
    loss = NextToken()
    total = 0.0
    tokens = trained = 0
    with tempfile.TemporaryDirectory(dir=job["work"]) as folder:
        source = batches(loaded, job, Path(folder))
        with torch.inference_mode(), autocast("cpu", loaded.compute.dtype):
            for step in range(source.steps // job["epochs"]):
                for batch in source.step_batches(step):
                    total += float(loss(loaded.model, batch)["next_token"])
                    tokens += int((batch.segment_ids != 0).sum())
                    trained += int((batch.labels[:, 1:] != IGNORE).sum())
    return {"loss": total / trained, "tokens": tokens, "trained": trained, "order": list(source.plan)}


def main() -> None:
    job = read_job()
    write_result(job, check(job) if job["check"] else train(job))


if __name__ == "__main__":
    main()
