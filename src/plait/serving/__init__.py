"""Tokens to HTTP."""
