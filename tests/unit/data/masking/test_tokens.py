"""BERT's rule: rates, places, whole words; beside the collator of transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE
from plait.data.masking.tokens import TokenMask

MASK, FIRST, SIZE = 4, 5, 60
RULE = TokenMask(mask=MASK, others=range(FIRST, SIZE))


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words_of(sizes: list[int]) -> list[int | None]:
    """Word numbers between two special tokens."""
    return [None, *(number for number, size in enumerate(sizes) for _ in range(size)), None]


TEXTS = st.lists(st.integers(1, 5), min_size=1, max_size=20)


@pytest.mark.row("S3-22")
@given(sizes=TEXTS, whole=st.booleans(), rate=st.sampled_from([0.05, 0.15, 0.4, 1.0]), seed=st.integers(0, 999))
def test_only_chosen_tokens_change_and_only_they_are_asked_for(
    sizes: list[int], whole: bool, rate: float, seed: int
) -> None:
    words = words_of(sizes)
    ids = torch.randint(FIRST, SIZE, (len(words),), generator=drawn(seed + 1))
    rule = TokenMask(mask=MASK, others=range(FIRST, SIZE), rate=rate, whole_words=whole)
    found = rule(ids.tolist(), words=words, generator=drawn(seed))
    chosen = found.labels != IGNORE
    assert torch.equal(found.labels[chosen], ids[chosen])
    assert torch.equal(found.token_ids[~chosen], ids[~chosen])
    assert not chosen[0]
    assert not chosen[-1]
    number, wanted = len(words) - 2, rate * (len(words) - 2)
    assert chosen.sum() >= 1
    if whole:
        marked: dict[int | None, set[bool]] = {}
        for word, one in zip(words, chosen.tolist(), strict=True):
            marked.setdefault(word, set()).add(one)
        assert all(len(both) == 1 for both in marked.values())
        assert chosen.sum() <= max(math.ceil(wanted), min(sizes))
    else:
        assert max(1, math.floor(wanted)) <= chosen.sum() <= min(number, max(1, math.ceil(wanted)))
    again = rule(ids.tolist(), words=words, generator=drawn(seed))
    assert torch.equal(found.token_ids, again.token_ids)


@pytest.mark.row("S3-22")
@pytest.mark.parametrize("whole", [False, True])
def test_rates_are_those_of_the_rule(whole: bool) -> None:
    """20,000 tokens in 500 texts: each share within four standard errors; words of two tokens."""
    rule = TokenMask(mask=MASK, others=range(FIRST, SIZE), whole_words=whole)
    generator, ids = drawn(0), torch.randint(FIRST, SIZE, (500, 40), generator=drawn(1))
    found = [rule(row.tolist(), words=[at // 2 for at in range(40)], generator=generator) for row in ids]
    labels, now = torch.stack([one.labels for one in found]), torch.stack([one.token_ids for one in found])
    chosen = labels != IGNORE
    number = int(chosen.sum())
    assert number / ids.numel() == pytest.approx(0.15, abs=0.002)  # 6 of 40 in every text
    masked, same = (now[chosen] == MASK).double().mean(), (now[chosen] == ids[chosen]).double().mean()
    assert float(masked) == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / number))
    stay = 0.1 + 0.1 / (SIZE - FIRST)  # another token is the same one now and then
    assert float(same) == pytest.approx(stay, abs=4 * math.sqrt(stay * (1 - stay) / number))
    others = now[chosen & (now != MASK) & (now != ids)]
    assert int(others.min()) >= FIRST
    assert len(others.unique()) > (SIZE - FIRST) / 2  # from all over the vocabulary
    places = chosen.double().mean(0)  # no place is chosen more than another
    assert float((places - 0.15).abs().max()) < 5 * math.sqrt(0.15 * 0.85 / 500)


def test_a_short_text_has_one_hidden_token_and_a_fraction_is_rounded_at_random() -> None:
    assert all(int((RULE([7, 8], generator=drawn(at)).labels != IGNORE).sum()) == 1 for at in range(50))
    counts = [int((RULE([*range(10, 20)], generator=drawn(at)).labels != IGNORE).sum()) for at in range(400)]
    assert set(counts) == {1, 2}  # 1.5 wanted
    assert sum(counts) / len(counts) == pytest.approx(1.5, abs=4 * 0.5 / 20)


def test_the_shortest_word_is_taken_where_every_word_is_too_long() -> None:
    rule = TokenMask(mask=MASK, others=range(FIRST, SIZE), whole_words=True)
    found = rule([*range(10, 19)], words=[0] * 4 + [1] * 2 + [2] * 3, generator=drawn(0))
    assert (found.labels != IGNORE).nonzero()[:, 0].tolist() == [4, 5]


@pytest.mark.row("S3-22")
def test_what_is_asked_and_put_in_place_is_as_in_transformers() -> None:
    """Same labels, same shares of masks, others and kept ones; there each token is chosen by a coin of its own."""
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    vocabulary |= {f"w{at}": at for at in range(FIRST, SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )
    rows = [[2, *torch.randint(FIRST, SIZE, (38,), generator=drawn(at)).tolist(), 3] for at in range(500)]
    collator = DataCollatorForLanguageModeling(fast, mlm_probability=0.15, seed=0)
    theirs: Any = collator([{"input_ids": row, "special_tokens_mask": [1] + [0] * 38 + [1]} for row in rows])
    words: list[int | None] = [None, *range(38), None]
    ours = [RULE(row, words=words, generator=drawn(at)) for at, row in enumerate(rows)]
    ids = torch.tensor(rows)

    def shares(token_ids: torch.Tensor, labels: torch.Tensor) -> list[float]:
        chosen = labels != IGNORE
        assert torch.equal(labels[chosen], ids[chosen])
        assert torch.equal(token_ids[~chosen], ids[~chosen])
        now, was = token_ids[chosen], ids[chosen]
        parts = (chosen.double().mean(), (now == MASK).double().mean(), (now == was).double().mean())
        return [float(part) for part in parts]

    one = shares(theirs["input_ids"], theirs["labels"])
    two = shares(torch.stack([o.token_ids for o in ours]), torch.stack([o.labels for o in ours]))
    assert two == pytest.approx(one, abs=0.035)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rate": 0.0}, "rate is 0"),
        ({"rate": 1.5}, "rate is 1.5"),
        ({"masked": 0.95}, "at most 1 together"),
        ({"replaced": -0.1}, "0 or more"),
        ({"others": ()}, "no other tokens"),
    ],
)
def test_rules_that_cannot_be_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TokenMask(**{"mask": MASK, "others": range(FIRST, SIZE), **given})


def test_texts_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="without a token that can be hidden"):
        RULE([2, 3], words=[None, None], generator=drawn(0))
    with pytest.raises(DataError, match="3 tokens, but words of 2"):
        RULE([7, 8, 9], words=[0, 1], generator=drawn(0))
