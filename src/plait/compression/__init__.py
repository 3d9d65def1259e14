"""Smaller models that answer as before: quantization."""
