"""A run folder as the stages leave it, small and made by hand, so that the page is tested against files alone."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

EVIL = "<script>alert(1)</script>"


def lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def shard(path: Path, split: str, names: Iterable[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for at, name in enumerate(names):
            picture = io.BytesIO()
            Image.new("RGB", (4, 4), (40 * at, 90, 40)).save(picture, "PNG")
            record = {
                "id": f"s{at}",
                "turns": [{"parts": [{"modality": "image", "uri": f"{path.name}#s{at}.png"}]}],
                "answers": [{"name": "name.en", "text": name}, {"name": "name.zh", "text": f"名{at}"}],
                "meta": {"source": "twemoji", "licence": "CC-BY-4.0", "split": split},
            }
            for ending, data in (("json", json.dumps(record).encode()), ("png", picture.getvalue())):
                member = tarfile.TarInfo(f"s{at}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def scores() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for split in ("test-concept", "test-both"):
        for metric, value in (("R@1", 0.2), ("R@5", 0.39), ("MRR", 0.29)):
            name, whole = f"retrieval/{split}/image-to-text/{metric}", {"n": 200, "failures": 0}
            rule = f"hit@{metric[2:]}; ci=bootstrap" if metric[0] == "R" else "mrr; ci=bootstrap"
            found.append(
                {"name": name, "value": value, "low": value - 0.05, "high": value + 0.06, "rule": rule} | whole
            )
            flat = {"value": 0.005, "low": 0.005, "high": 0.005, "rule": "chance"}
            found.append({"name": f"{name}/chance"} | flat | whole)
            found.append({"name": f"{name}/untrained", "value": 0.01, "low": 0.0, "high": 0.02, "rule": rule} | whole)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of two stages, with a name that is an attack."""
    run = tmp_path / "tiny-0001"
    data, pretrain = run / "01-data", run / "02-pretrain"
    (data / "shards").mkdir(parents=True)
    (pretrain / "samples").mkdir(parents=True)
    (run / "recipe.yaml").write_text(
        "name: tiny\nseed: 7\ndata:\n  kind: data\nstages:\n  pretrain:\n    kind: pretrain\n"
    )
    env = {"plait": "0.1.0", "python": "3.11.7", "versions": {"torch": "2.13"}, "command": ["/x/plait", "run", "tiny"]}
    (run / "env.json").write_text(json.dumps(env))
    events: list[dict[str, Any]] = [
        {"time": 1000.0, "kind": "stage", "text": "01-data: started", "stage": "data", "state": "started"},
        {"time": 1007.0, "kind": "warning", "text": f"a caption is {EVIL}"},
        {"time": 1010.0, "kind": "stage", "text": "01-data: done", "stage": "data", "state": "done", "seconds": 10},
        {"time": 1010.5, "kind": "stage", "text": "02-pretrain: started", "stage": "pretrain", "state": "started"},
        {"time": 1040.5, "kind": "stage", "text": "02-pretrain: done", "stage": "pretrain", "state": "done"},
    ]
    (run / "events.jsonl").write_text(lines(events))
    summary: dict[str, Any] = {"splits": {"train": 2, "test-both": 2}, "instruct": {"train": {"yesno": 4}}}
    done = {"kind": "data", "previous": None, "summary": summary | {"ledger": {"rows": 5}}}
    (data / "done.json").write_text(json.dumps(done))
    (data / "spec.json").write_text('{"kind": "data"}')
    fates = [{"source": "twemoji", "fate": "kept"}] * 4 + [{"source": EVIL, "fate": "dropped", "reason": "flag"}]
    (data / "ledger.jsonl").write_text(lines(fates))
    (data / "card.md").write_text(f"# Data card\n\n{EVIL}\n\n- **twemoji** (1.0): pictures.\n  Twemoji, copyright X.\n")
    shard(data / "shards" / "train-000.tar", "train", ["violin", EVIL])
    shard(data / "shards" / "test-both-000.tar", "test-both", ["cyclone", "crayon"])
    summary = {"lines": ["test-both: found first for 20.0%"], "steps": 40, "pairs": {"train": 2}}
    done = {"kind": "pretrain", "previous": "../01-data", "summary": summary}
    (pretrain / "done.json").write_text(json.dumps(done))
    (pretrain / "spec.json").write_text('{"kind": "pretrain", "image_tower": "lite0", "text_tower": "minilm"}')
    metrics = [
        {"step": s, "loss": 6 / s, "loss/c": 6 / s, "grad_norm": 1.0, "lr": 1e-3, "samples": 8} for s in range(1, 41)
    ]
    (pretrain / "metrics.jsonl").write_text(lines(metrics))
    (pretrain / "scores.json").write_text(json.dumps(scores()))
    top = [{"text": EVIL, "score": 0.3}, {"text": "cyclone", "score": 0.2}]
    sample = {
        "id": "s0",
        "split": "test-both",
        "uri": "test-both-000.tar#s0.png",
        "truth": "cyclone",
        "rank": 2,
        "top": top,
    }
    for step in (0, 40):
        (pretrain / "samples" / f"{step:06d}.json").write_text(json.dumps({"step": step, "samples": [sample]}))
    (pretrain / "predictions.jsonl").write_text(lines([sample, sample | {"rank": 1}]))
    return run
