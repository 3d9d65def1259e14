"""The first batch of a stage as a picture: what the model is shown, and on which tokens a loss is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from plait.assembly.multimodal import Multimodal
from plait.core.tensors import IGNORE, Batch
from plait.report.loss_mask import byte_level_text, cells, draw_batch


def draw_first_batch(
    batch: Batch, built: Multimodal, path: Path, *, open_picture: Callable[[str], Image.Image], title: str
) -> None:
    """Draw a batch token by token.

    Args:
        batch: As it goes into the model.
        built: Whose tokenizer and placeholder.
        path: The PNG to write; its folder is made.
        open_picture: A sample's picture by the sample's id.
        title: Above the drawing.
    """
    tokenizer = built.language.tokenizer

    def decode(token: int) -> str:
        piece = tokenizer.convert_ids_to_tokens(token)
        return byte_level_text(str(piece))

    rows = cells(
        batch.token_ids.tolist(),
        (batch.labels != IGNORE).tolist(),
        batch.segment_ids.tolist(),
        placeholders=built.model.placeholders.values(),
        decode=decode,
    )
    path.parent.mkdir(exist_ok=True)
    draw_batch(rows, [open_picture(name) for name in batch.sample_ids], path, title=title, notes=())
