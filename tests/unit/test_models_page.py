"""docs/models.md: every example runs and prints what it says."""

import doctest
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_examples_of_the_page() -> None:
    before = torch.is_grad_enabled()
    try:
        failed, tried = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.REPORT_NDIFF)
    finally:
        torch.set_grad_enabled(before)
    assert failed == 0
    assert tried > 30
