"""Command line: one file a verb; importing it imports no torch."""
