"""Folder to model and back: the only loader and saver."""
