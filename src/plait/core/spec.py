"""Typed configuration (being written)."""
from __future__ import annotations
from pydantic import BaseModel, ConfigDict

class Spec(BaseModel):
    """Base of every setting: frozen, unknown keys are errors."""
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
