"""The first batch of a stage as a picture: what the model is shown, and on which tokens a loss is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from plait.assembly.multimodal import Multimodal
from plait.core.tensors import IGNORE, Batch
from plait.core.types import Sample
from plait.data.conversations import ConversationBatches
from plait.data.media import STORED, decode_image
from plait.data.shards import ShardReader
from plait.report.loss_mask import byte_level_text, cells, draw_batch


def draw_first_questions(
    batches: ConversationBatches, samples: Sequence[Sample], *, shards: Path, built: Multimodal, folder: Path
) -> None:
    """Draw the first batch of a source of questions, whole: ``batches/first.png``.

    Args:
        batches: Of this process.
        samples: That are trained.
        shards: Folder of the data stage's.
        built: Whose tokenizer and placeholder.
        folder: Of the stage.
    """
    (batch,) = replace(batches, pieces=1, rank=0, world=1).step_batches(0)
    of_sample = {sample.id: sample.media()[0] for sample in samples}
    with ShardReader(shards, "train") as reader:

        def open_picture(name: str) -> Image.Image:
            ref = of_sample[name]
            return decode_image(reader.media(ref), place=ref.uri, limits=STORED)

        draw_first_batch(
            batch,
            built,
            folder / "batches" / "first.png",
            open_picture=open_picture,
            title="The first batch, as the model gets it",
        )


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
