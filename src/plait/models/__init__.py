"""Batches to features to logits."""
