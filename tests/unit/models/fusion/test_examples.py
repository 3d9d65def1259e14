"""Examples in docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

from plait.models import fusion

MODULES = [module.name for module in pkgutil.iter_modules(fusion.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"plait.models.fusion.{name}"))
    assert found.failed == 0
