"""What the text's side of a dual encoder needs, from its settings alone: a frozen tower, or one that learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from plait.stages.stage import named_setting

if TYPE_CHECKING:
    from plait.models.measure import Account
    from plait.models.text_specs import ScratchTextTower

# Sizes of the default tower; tests compare them with the weights.
TEXT_WEIGHTS, TEXT_WIDTH = 22_565_376, 384
TEXT_TOKENS = 8  # of a name
_TEXT_FLOPS = 2 * 10.6e6 * 8  # a name of 8 tokens, embeddings not counted
_SECONDS_PER_TEXT = (0.002, 0.006)  # measured on one core: 390 names a second


def text_account(spec: ScratchTextTower) -> Account:
    """What a text tower from scratch costs with all the ids that it may have, a text being a name; imports torch.

    Raises:
        ConfigError: Its sizes do not fit together, or its vocabulary does not hold all bytes.
    """
    from plait.assembly.text_scratch import bare, build_text_tower
    from plait.models.measure import media_account

    with named_setting("stages.pretrain.text_tower"):
        return media_account(lambda: build_text_tower(bare(spec)), (1, 1, TEXT_TOKENS), channels=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The text's side.

    Attributes:
        frozen: Weights that stay as they are.
        learn: Weights that learn; of them ``blocks`` lie in ``layers`` blocks.
        d_out: Width of a text's vector.
        flops: Forward, of a text in a step; 0 where features are made once.
        kept_bytes: Of a text, for the way back.
    """

    frozen: int = TEXT_WEIGHTS
    learn: int = 0
    blocks: int = 0
    layers: int = 0
    d_out: int = TEXT_WIDTH
    flops: int = 0
    kept_bytes: int = 0

    @classmethod
    def of(cls, tower: str | ScratchTextTower) -> Words:
        """Of a stage's setting.

        Raises:
            ConfigError: As :func:`text_account`.
        """
        if isinstance(tower, str):
            return cls()
        cost = text_account(tower)
        return cls(
            frozen=0,
            learn=cost.trainable,
            blocks=cost.trainable - tower.vocabulary * tower.d,
            layers=tower.depth,
            d_out=cost.d_out,
            flops=cost.flops,
            kept_bytes=cost.kept_bytes,
        )

    def once(self, texts: int) -> tuple[float, float, float]:
        """Operations and both ends of the seconds in which features of texts are made."""
        low, high = _SECONDS_PER_TEXT
        return (0.0, 0.0, 0.0) if self.learn else (texts * _TEXT_FLOPS, texts * low, texts * high)

    def cached(self, texts: int) -> int:
        """Bytes of their features."""
        return 0 if self.learn else 4 * texts * TEXT_WIDTH

    @property
    def note(self) -> str:
        """A line about it."""
        return (
            f"the text tower learns from scratch: at most {self.learn:,} weights; its vocabulary is learned from the "
            f"names, counted with {TEXT_TOKENS} tokens each"
            if self.learn
            else "sizes and speeds of texts are those of minilm"
        )
