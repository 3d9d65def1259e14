"""Plait: build your own multimodal model, from raw files to served tokens."""

__version__ = "0.1.0"
