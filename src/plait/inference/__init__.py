"""Checkpoint to tokens."""
