"""Search over a recipe's settings: ``plait sweep``."""
