"""docs/models.md and the pages under it: every example runs and prints what it says, and every part has its place."""

import doctest
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from plait.models import audio_specs, fusion_specs, specs, text_specs, video_specs
from plait.models.towers import families, pretrained_audio

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"models.md": 30, "models/encoders.md": 60, "models/fusion.md": 50}


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_the_page(page: str) -> None:
    before = torch.is_grad_enabled()
    try:
        failed, tried = doctest.testfile(str(DOCS / page), module_relative=False, optionflags=doctest.REPORT_NDIFF)
    finally:
        torch.set_grad_enabled(before)
    assert failed == 0
    assert tried > PAGES[page]


def test_no_page_is_left_out() -> None:
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.glob("models*/*.md")} | {"models.md"} == set(PAGES)


@pytest.mark.parametrize(
    ("page", "union"),
    [
        ("models/encoders.md", specs.ImageEncoder),
        ("models/encoders.md", audio_specs.AudioEncoder),
        ("models/encoders.md", video_specs.VideoEncoder),
        ("models/encoders.md", text_specs.TextEncoder),
        ("models/fusion.md", fusion_specs.Fusion),
    ],
)
def test_every_part_of_the_list_is_on_its_page_with_an_example(page: str, union: Any) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for part in get_args(get_args(union)[0]):
        assert f"`{part.model_fields['kind'].default}`" in text
        assert f"specs.{part.__name__}(" in text


def test_every_family_is_on_the_page() -> None:
    text = (DOCS / "models/encoders.md").read_text(encoding="utf-8")
    assert [kind for kind in (*families.FAMILIES, *pretrained_audio.FAMILIES) if f"`{kind}`" not in text] == []
