"""Changes of pictures that leave their meaning."""
