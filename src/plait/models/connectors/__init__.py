"""Connectors: a tower's features to the decoder's width, as patches again, so that connectors chain like layers."""
