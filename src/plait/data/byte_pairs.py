"""A vocabulary of its own for a text tower that learns from scratch: byte pairs, learned from the texts of training.

Byte-level BPE (Sennrich et al., https://arxiv.org/abs/1508.07909; on bytes as in GPT-2) by Hugging Face's tokenizers:
every text of every script has ids, and none is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from plait.core.errors import CheckpointError, ConfigError

LEAST = 259
"""Ids of the smallest vocabulary: all bytes, and what pads, begins and ends a text."""

_PAD, _START, _END = "<pad>", "<s>", "</s>"


def check_size(size: int) -> None:
    """See that a vocabulary holds all bytes.

    Raises:
        ConfigError: It does not.
    """
    if size < LEAST:
        raise ConfigError(
            f"a vocabulary of {size} ids does not hold all bytes and three marks",
            place="vocabulary",
            remedy=f"set {LEAST} or more",
        )


class BytePairs:
    """Texts to ids and back. A text begins with one id and ends with another, in which a tower may pool it.

    Args:
        tokenizer: As :meth:`learn` or :meth:`read` make it.

    Example:
        >>> words = BytePairs.learn(["red apple", "green apple", "苹果"], size=300)
        >>> words.text(words.ids(["red 苹果"])[0])
        'red 苹果'
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def learn(cls, texts: Sequence[str], *, size: int) -> BytePairs:
        """Learn the pairs that come most often; the same for the same texts in any order.

        Args:
            texts: Of training.
            size: Ids at most; fewer where there are no more pairs that come twice.

        Raises:
            ConfigError: The size does not hold all bytes.
        """
        check_size(size)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=[_PAD, _START, _END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sorted(texts), trainer)
        marks = [(name, tokenizer.token_to_id(name)) for name in (_START, _END)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{_START} $A {_END}", special_tokens=marks)
        return cls(tokenizer)

    @classmethod
    def read(cls, text: str, *, place: str) -> BytePairs:
        """From what :meth:`written` gave.

        Raises:
            CheckpointError: It is no tokenizer.
        """
        try:
            return cls(Tokenizer.from_str(text))
        except Exception as error:  # the library raises Exception itself
            raise CheckpointError(
                f"no tokenizer: {error}", place=place, remedy="use an undamaged copy of the folder"
            ) from error

    def written(self) -> str:
        """As ``tokenizer.json``."""
        return self._tokenizer.to_str()

    @property
    def size(self) -> int:
        """Ids that there are."""
        return self._tokenizer.get_vocab_size()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, never cut. What looks like a mark in a text is text."""
        self._tokenizer.encode_special_tokens = True
        return [one.ids for one in self._tokenizer.encode_batch(list(texts))]

    def text(self, ids: Sequence[int]) -> str:
        """What ids stand for, without the marks."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)
