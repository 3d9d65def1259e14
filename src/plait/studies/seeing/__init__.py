"""What the study of encoders does."""
