"""What the study of Transformers does."""
