"""Changes of pictures and of features while training."""
