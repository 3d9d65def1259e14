"""Losses as pure functions that return sums."""
