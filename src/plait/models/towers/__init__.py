"""Encoders, from scratch or pretrained."""
