"""A BERT-like text encoder as sentence features: one unit vector a text."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plait.core.errors import DataError


class TextTower(nn.Module):
    """Texts to sentence features: the mean of the last hidden states over all tokens, scaled to length 1.

    Special tokens count in the mean and padding does not: the convention of sentence-transformers
    (https://arxiv.org/abs/1908.10084) that models such as all-MiniLM-L6-v2 were trained with.

    Args:
        backbone: A Hugging Face encoder, such as ``BertModel``.
        tokenizer: Its tokenizer.
        max_tokens: Longest text allowed, special tokens included; a longer one is an error, never cut.
        batch_size: Texts computed together at most. Texts of like length share a batch.

    Example:
        >>> tower = load_text_tower("minilm").encoder   # of plait.assembly.towers
        >>> bicycle, bike, lemon = tower(["bicycle", "bike", "lemon"])
        >>> bool(bicycle @ bike > bicycle @ lemon)
        True
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int = 128,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.d_out: int = backbone.config.hidden_size

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text with special tokens: what to look at before a text is too long."""
        return [len(ids) for ids in self._tokenize(texts)]

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Encode; in float32 whatever the weights are, since bfloat16 cannot hold a unit vector's length.

        Raises:
            DataError: Texts are longer than ``max_tokens``; says how many, which is the first, and by how much.
        """
        token_ids = self._tokenize(texts)
        self._check_length(texts, token_ids)
        order = sorted(range(len(texts)), key=lambda i: len(token_ids[i]))
        parts = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        done = [self._encode([token_ids[i] for i in part]) for part in parts]
        if not done:
            return torch.zeros(0, self.d_out, device=self.backbone.device)
        return torch.cat(done)[torch.tensor(order).argsort()]

    def _encode(self, rows: list[list[int]]) -> Float[Tensor, "b d"]:
        # Few distinct widths: oneDNN plans its kernels anew for every shape.
        width = -(-max(map(len, rows)) // 8) * 8
        device = self.backbone.device
        token_ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            token_ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        mask = mask.to(device)
        hidden = self.backbone(input_ids=token_ids.to(device), attention_mask=mask).last_hidden_state.float()
        weight = mask[..., None].float()
        return functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]

    def _check_length(self, texts: Sequence[str], token_ids: list[list[int]]) -> None:
        long = [i for i, ids in enumerate(token_ids) if len(ids) > self.max_tokens]
        if long:
            first = long[0]
            raise DataError(
                f"{len(long)} of {len(texts)} texts are longer than {self.max_tokens} tokens; "
                f"the first has {len(token_ids[first])}: {texts[first][:60]!r}",
                place=f"text {first} of the batch",
                remedy="shorten or leave out those texts (count_tokens tells), or raise max_tokens",
            )
