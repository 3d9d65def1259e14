"""``python -m plait``."""

from plait.cli.main import entry

entry()
