"""Compositions of every encoder, connector and decoder."""
