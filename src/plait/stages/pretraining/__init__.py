"""What the pretrain stage does."""
