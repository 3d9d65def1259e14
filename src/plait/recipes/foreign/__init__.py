"""Configurations of other tools, read as Plait recipes: ``plait config import``."""
