"""Tests; a package, so that they can be run from here (`python -m tests.matrix`)."""
