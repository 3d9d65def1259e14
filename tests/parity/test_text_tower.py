"""The text tower = sentence-transformers."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from plait.core.errors import DataError
from plait.models.towers.text import TextTower


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of letters: a=10, b=11, ... between 1 and 2."""
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2} | {chr(87 + i): i for i in range(10, 36)}
    backend = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    # Shorter than what the tests ask for: the tower must not cut where a tokenizer would.
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", model_max_length=5)


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return TextTower(BertModel(config, add_pooling_layer=False).eval(), letters(), max_tokens=12, batch_size=3)


@pytest.mark.row("S4-39")
@pytest.mark.real
@torch.inference_mode()
def test_embeddings_are_those_of_sentence_transformers(golden, packages):
    from plait.assembly.towers import load_text_tower

    tensors, record = golden("text")
    wanted = tensors["embeddings"]
    tower = load_text_tower("minilm", dtype="float32").encoder
    assert tower.count_tokens(record["texts"]) == record["tokens"]
    # Texts of one batch differ in length here and not there: padding must not matter. Worst measured: 2e-7.
    torch.testing.assert_close(tower(record["texts"]), wanted, atol=2e-6, rtol=0)
    coarse = load_text_tower("minilm", dtype="bfloat16").encoder(record["texts"]).float()
    assert (coarse * wanted).sum(1).min() > 0.999  # worst measured: 0.9999


@torch.inference_mode()
def test_a_text_comes_out_the_same_alone_and_in_any_company(tower):
    texts = ["abc", "a", "", "abcabcabca", "cab", "b", "abcabcab"]
    together = tower(texts)
    assert together.shape == (7, tower.d_out)
    torch.testing.assert_close(together, torch.cat([tower([t]) for t in texts]), atol=1e-6, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(7))


@torch.inference_mode()
def test_the_mean_is_over_the_tokens_of_the_text_alone(tower):
    hidden = tower.backbone(input_ids=torch.tensor([[1, 10, 11, 2]])).last_hidden_state[0]
    wanted = hidden.mean(0) / hidden.mean(0).norm()
    torch.testing.assert_close(tower(["ab"])[0], wanted, atol=1e-6, rtol=0)


def test_too_long_is_an_error_with_numbers_and_never_cut(tower):
    assert tower.count_tokens(["a" * 10, "a" * 11]) == [12, 13]
    tower(["a" * 10])
    with pytest.raises(
        DataError, match=r"2 of 3 texts are longer than 12 tokens; the first has 13: 'aaaaaaaaaaa'"
    ) as caught:
        tower(["a", "a" * 11, "b" * 30])
    assert caught.value.place == "text 1 of the batch"


def test_no_texts_give_no_rows(tower):
    assert tower([]).shape == (0, 16)


def test_gradients_flow_when_it_is_not_frozen(tower):
    tower(["ab", "c"])[:, 0].sum().backward()
    assert tower.backbone.embeddings.word_embeddings.weight.grad[10].abs().sum() > 0
