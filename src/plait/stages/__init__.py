"""Stages: a typed spec in, a finished folder out. One file a stage kind."""
