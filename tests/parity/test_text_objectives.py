"""Masked, prefix, autoregressive and span-corruption losses beside transformers: values and gradients, same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from plait.core.tensors import IGNORE, Batch
from plait.data.masking.spans import SpanMask
from plait.data.masking.tokens import TokenMask
from plait.data.text_batches import Continued, Form, Hidden, Rewritten, TextBatches, TokenText, as_it_is
from plait.models.hub import bert, gpt2, t5
from plait.models.reading import MaskedReader, Rewriter, Writer
from plait.models.towers.seq2seq import EncoderDecoder
from plait.models.towers.text_transformer import TextTransformer
from plait.objectives.language import NextToken
from plait.objectives.masked import MaskedTokens

VOCABULARY, MASK, END = 30, 29, 1
SPANS = Rewritten(rule=SpanMask(sentinels=range(28, 20, -1), rate=0.3), end=END)
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batches(form: Form, **given: Any) -> TextBatches:
    """Six texts of 6 to 16 tokens."""
    draw = torch.Generator().manual_seed(1)
    rows: list[list[int]] = [torch.randint(2, 20, (6 + 2 * at,), generator=draw).tolist() for at in range(6)]
    texts = [TokenText(id=f"s{at}", token_ids=row) for at, row in enumerate(rows)]
    return TextBatches(texts=texts, form=form, batch_size=6, longest=40, seed=0, **given)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def same(
    ours: nn.Module, keyed: Callable[[dict[str, Any]], dict[str, Any]], theirs: PreTrainedModel, *, gap: float = 1e-10
) -> None:
    """Every gradient under the official name."""
    wanted, found = gradients(theirs), keyed(gradients(ours))
    assert set(wanted) <= set(found)
    for name, one in wanted.items():
        assert float((found[name] - one).abs().max()) < gap, name


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.row("S3-22")
def test_masked_tokens_beside_bert() -> None:
    config = BertConfig(**TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, vocab_size=VOCABULARY,
                        max_position_embeddings=20)  # fmt: skip
    theirs = BertForMaskedLM(config).double().eval()
    weights = state(theirs)
    text = TextTransformer(bert.sizes_from({**config.to_dict(), "architectures": ["BertForMaskedLM"]})).double().eval()
    text.load_state_dict(bert.to_ours(weights))
    (batch,) = batches(Hidden(rule=TokenMask(mask=MASK, others=range(2, 20), rate=0.4))).step_batches(0)
    objective = MaskedTokens()
    count = int(objective.count(batch)["masked"])
    loss = objective(MaskedReader(text), batch)["masked"] / count
    wanted = theirs(batch.token_ids, attention_mask=batch.segment_ids, labels=batch.labels).loss
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    same(text, bert.to_official, theirs)


@pytest.mark.row("S4-48")
@pytest.mark.parametrize("form", [as_it_is, Continued(shortest=2)])
def test_next_tokens_beside_gpt(form: Form) -> None:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=40,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    theirs = GPT2LMHeadModel(config).double().eval()
    weights = state(theirs)
    text = TextTransformer(gpt2.sizes_from({**config.to_dict(), "architectures": ["GPT2LMHeadModel"]})).double().eval()
    text.load_state_dict(gpt2.to_ours(weights))
    (batch,) = batches(form).step_batches(0)
    objective = NextToken()
    count = int(objective.count(batch)["next_token"])
    loss = objective(Writer(text), batch)["next_token"] / count
    found = theirs(batch.token_ids, attention_mask=batch.segment_ids, labels=batch.labels)
    torch.testing.assert_close(loss.float(), found.loss)  # which is computed in float32
    wanted = nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    same(text, gpt2.to_official, theirs)


@pytest.mark.row("S4-49")
@pytest.mark.parametrize(
    "form", [Rewritten(rule=SpanMask(sentinels=range(28, 20, -1), rate=0.3), end=END), Continued()]
)
def test_rewriting_beside_t5(form: Form) -> None:
    config = T5Config(d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=2, vocab_size=VOCABULARY,
                      dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
    theirs = T5ForConditionalGeneration(config).double().eval()
    weights = state(theirs)
    sizes = t5.sizes_from(config.to_dict())
    model = EncoderDecoder(sizes).double().eval()
    model.load_state_dict(t5.to_ours(weights, sizes))
    (batch,) = batches(form).step_batches(0)
    objective = NextToken()
    count = int(objective.count(batch)["next_token"])
    loss = objective(Rewriter(model), batch)["next_token"] / count
    read, written = apart(batch)
    wanted = theirs(input_ids=read.clamp(min=0), attention_mask=(read != IGNORE).long(), labels=written).loss
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    same(model, lambda found: t5.to_official(found, sizes), theirs, gap=1e-7)  # their norm is float32


def apart(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What each row reads and writes, as transformers wants it: padded with -100."""

    def stacked(parts: Sequence[list[int]]) -> torch.Tensor:
        width = max(map(len, parts))
        return torch.tensor([part + [IGNORE] * (width - len(part)) for part in parts])

    rows = [
        (ids[:size], labels[:size])
        for ids, labels, size in zip(
            batch.token_ids.tolist(), batch.labels.tolist(), batch.segment_ids.sum(1).tolist(), strict=True
        )
    ]
    read = [[token for token, label in zip(*row, strict=True) if label == IGNORE] for row in rows]
    written = [[label for label in labels if label != IGNORE] for _, labels in rows]
    return stacked(read), stacked(written)
