"""Packed rows: each document has the loss that it has in a row of its own, and so have all weights their gradients.

In float64. Decoders whose norms or softmax turn to float32 inside, as LLaMA's do, round there: their losses are equal
to 1e-6 all the same, and gradients to 5e-6 (worst seen: 1.9e-6, MPT). Others to 1e-10.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from plait.core.errors import ConfigError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.data.collate import joined
from plait.models.connectors.projection import Mlp
from plait.models.crossattend import GatedCrossAttention
from plait.models.multimodal import MultimodalLM
from plait.models.packing import packed_masks
from plait.models.towers.text_transformer import Position, TextSizes, TextTransformer
from plait.models.transformer import TransformerSizes
from plait.objectives.language import NextToken
from plait.objectives.preference import answer_logprobs

WORDS, HOLE = 40, 40
DOCUMENTS = [(2, 5), (0, 9), (3, 3), (1, 1), (0, 2), (2, 12)]
"""Cells of the document's picture (0: none) and its words."""

# By the position scheme. Those of the second list compute parts in float32 whatever their format.
EXACT = ["gpt2", "opt", "gpt_neox", "phi", "stablelm", "falcon"]  # learned absolute, rotary, part of it, one key head
ROUNDS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "gptj", "mpt"]  # SmolLM3: not in every layer


def decoder(kind: str, **more: Any) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    match kind:
        case "gpt2" | "gptj":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
            sizes |= {"rotary_dim": 4} if kind == "gptj" else {}
            sizes |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        case "opt":
            sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
        case "mpt":
            sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
        case _:
            pass
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": WORDS}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **ends, **more))
    for weight in made.parameters():
        nn.init.normal_(weight, mean=1.0 if weight.ndim == 1 else 0.0, std=0.25)
    return made.double().eval()


def composed(kind: str, *, inside: bool, **more: Any) -> MultimodalLM:
    made = decoder(kind, **more)
    torch.manual_seed(1)
    if not inside:
        return MultimodalLM({}, {"image": Mlp(6, 8, 32)}, made, placeholder=HOLE).double()
    sizes = TransformerSizes(d=32, depth=1, heads=4, d_source=12)
    reading = [GatedCrossAttention(sizes) for _ in range(2)]
    for read in reading:
        nn.init.constant_(read.gate, 0.7)
        nn.init.constant_(read.feed_forward_gate, -0.5)
    model = MultimodalLM({}, {"image": Mlp(6, 8, 12)}, made, placeholder=HOLE, reading=reading, inside="image")
    nn.init.normal_(model.mark)
    return model.double()


def document(number: int, cells: int, words: int, *, inside: bool) -> Batch:
    """One row: a word, its picture, more words; every token but the picture's is trained."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, WORDS, (words,), generator=generator)
    holes = torch.full((min(cells, 1) if inside else cells,), HOLE)
    ids = torch.cat([ids[:1], holes, ids[1:]])[None]
    picture = Patches(values=torch.randn(cells, 6, generator=generator).double(), grid=torch.tensor([[1, 1, cells]]))
    return Batch(
        token_ids=ids,
        labels=torch.where(ids == HOLE, IGNORE, ids),
        segment_ids=torch.ones_like(ids),
        media={"image": picture} if cells else {},
        item_row={"image": torch.tensor([0])} if cells else {},
        sample_ids=(str(number),),
        encoded=True,
    )


def packed(documents: list[Batch], rows: list[list[int]], *, width: int) -> Batch:
    """Documents one after the other in these rows, with padding behind them."""
    filled: list[list[Tensor]] = []
    pictures, of_row = [], []
    for number, row in enumerate(rows):
        fill = width - sum(documents[i].token_ids.shape[1] for i in row)
        assert fill >= 0
        parts = [(documents[i].token_ids[0], documents[i].labels[0], s) for s, i in enumerate(row, 1)]
        ids = [p[0] for p in parts] + [torch.zeros(fill, dtype=torch.long)]
        labels = [p[1] for p in parts] + [torch.full((fill,), IGNORE)]
        segments = [torch.full_like(p[0], p[2]) for p in parts] + [torch.zeros(fill, dtype=torch.long)]
        filled.append([torch.cat(ids), torch.cat(labels), torch.cat(segments)])
        for i in row:
            pictures += documents[i].media.values()
            of_row += [number] * len(documents[i].media)
    ids, labels, segments = (torch.stack(column) for column in zip(*filled, strict=True))
    return Batch(
        token_ids=ids,
        labels=labels,
        segment_ids=segments,
        media={"image": joined(pictures)},
        item_row={"image": torch.tensor(of_row)},
        sample_ids=tuple(str(i) for row in rows for i in row),
        encoded=True,
    )


ROWS = [[0, 1, 2], [5, 3], [4]]


def both(model: MultimodalLM, *, inside: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Log-probability of each document and gradients of the sum of losses: packed, and one document a row."""
    documents = [document(n, *sizes, inside=inside) for n, sizes in enumerate(DOCUMENTS)]
    objective = NextToken()
    found: list[dict[str, Tensor]] = []
    for batches in ([packed(documents, ROWS, width=26)], documents):
        said = {
            f"document {name}": value.detach()
            for batch in batches
            for name, value in zip(batch.sample_ids, answer_logprobs(model, batch), strict=True)
        }
        model.zero_grad()
        for batch in batches:
            loss = objective(model, batch)["next_token"]
            if loss.requires_grad:
                loss.backward()
        said |= {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
        found.append(said)
    counted = sum(int(objective.count(one)["next_token"]) for one in documents)
    assert int(objective.count(packed(documents, ROWS, width=26))["next_token"]) == counted
    return found[0], found[1]


def check(model: MultimodalLM, *, exact: bool, inside: bool = False) -> None:
    together, alone = both(model, inside=inside)
    assert set(together) == set(alone)
    for name, wanted in alone.items():
        close = 1e-10 if exact else 1e-6 if name.startswith("document") else 5e-6
        scale = max(1.0, float(wanted.abs().max()))  # the gradient of a bias of keys is nothing but rounding
        gap = float((together[name] - wanted).abs().max())
        assert gap <= close * scale, f"{name}: {gap:.1e} of {scale:.1e}"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", EXACT + ROUNDS)
def test_a_packed_document_has_the_loss_and_gradients_of_its_own_row(kind: str, attention: str) -> None:
    model = composed(kind, inside=False)
    model.decoder.set_attn_implementation(attention)  # pyright: ignore[reportCallIssue]
    # Eager attention of transformers has its softmax in float32.
    check(model, exact=kind in EXACT and (attention == "sdpa" or kind in ("gpt2", "falcon")))


@pytest.mark.row("S2-11")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_media_that_are_read_inside_are_those_of_the_own_document(kind: str) -> None:
    check(composed(kind, inside=True), exact=kind == "gpt2", inside=True)


@pytest.mark.parametrize(
    ("kind", "window"),
    [
        pytest.param("mistral", {"sliding_window": 4}, id="all layers"),
        pytest.param(
            "qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}, id="one of two"
        ),
        pytest.param(
            "gemma3_text",
            {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8},
            id="two rotations",
        ),
    ],
)
def test_layers_that_look_back_a_window_do_so_inside_a_document(kind: str, window: dict[str, Any]) -> None:
    model = composed(kind, inside=False, **window)
    check(model, exact=False)
    text = document(1, 0, 9, inside=False)
    own = model.decoder.base_model(  # pyright: ignore[reportCallIssue]
        input_ids=text.token_ids, attention_mask=text.segment_ids, use_cache=False
    ).last_hidden_state
    torch.testing.assert_close(model.hidden(text), own, rtol=1e-6, atol=1e-6)
    wide = composed(kind, inside=False, **window | {"sliding_window": 64})
    assert not torch.allclose(wide.hidden(text), own, rtol=1e-2, atol=1e-2), "the window makes a difference"


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        ("mamba", {}, r"mamba has layers \(linear_attention\)"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, r"lfm2 has layers \(conv\)"),
        ("recurrent_gemma", {"attention_window_size": 8, "lru_width": 32}, "recurrent_gemma has layers"),
    ],
)
def test_decoders_that_hand_on_a_state_are_refused_where_rows_are_packed(
    kind: str, more: dict[str, Any], says: str
) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **more
    )
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=says) as caught:
        packed_masks(made, torch.tensor([[1, 1, 2]]), torch.float32)
    assert "one sample into a row" in caught.value.remedy
    assert isinstance(packed_masks(made, torch.tensor([[1, 1, 0]]), torch.float32), Tensor)


def test_attention_that_takes_no_masks_is_refused_where_rows_are_packed() -> None:
    made = decoder("llama")
    made.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="attention 'flash_attention_2', which takes no masks of samples"):
        packed_masks(made, torch.tensor([[1, 1, 2]]), torch.float32)


@pytest.mark.parametrize("spoil", ["positions", "mask"])
def test_the_proof_would_see_positions_or_masks_of_the_whole_row(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = composed("gpt2", inside=False)
    module = "plait.models.multimodal"
    if spoil == "positions":
        monkeypatch.setattr(f"{module}.positions", lambda ids: torch.arange(ids.shape[1]).expand_as(ids))
    else:
        whole: Callable[..., Any] = lambda decoder, ids, dtype: packed_masks(decoder, (ids > 0).long(), dtype)  # noqa: E731
        monkeypatch.setattr(f"{module}.packed_masks", whole)
    together, alone = both(model)
    gap = max(float((together[f"document {n}"] - alone[f"document {n}"]).abs()) for n in range(len(DOCUMENTS)))
    assert gap > 1e-2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("position", ["learned", "sincos", "rope", "buckets", "alibi", "none"])
def test_our_own_text_transformer_keeps_texts_of_a_row_apart(position: Position, causal: bool) -> None:
    torch.manual_seed(0)
    inner = TransformerSizes(d=32, depth=2, heads=4, norm="rms", gated=True)
    model = TextTransformer(
        TextSizes(transformer=inner, vocabulary=WORDS, causal=causal, position=position, max_tokens=16)
    ).double()
    texts = [torch.randint(0, WORDS, (1, n)) for n in (5, 9, 1, 12)]
    row = torch.cat([*texts, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    segments = torch.cat([torch.full_like(t, n) for n, t in enumerate(texts, 1)] + [torch.zeros(1, 3).long()], dim=1)
    weights = dict(model.named_parameters())
    found: list[dict[str, Tensor]] = []
    for hidden in (
        model(row, segment_ids=segments)[:, :-3],
        torch.cat([model(t, segment_ids=torch.ones_like(t)) for t in texts], dim=1),
    ):
        slopes = torch.autograd.grad(hidden.sin().sum(), list(weights.values()), allow_unused=True)
        found.append({"hidden": hidden} | {n: g for n, g in zip(weights, slopes, strict=True) if g is not None})
    for name, wanted in found[1].items():
        torch.testing.assert_close(found[0][name], wanted, rtol=1e-10, atol=1e-10)
