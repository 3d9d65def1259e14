"""What the study of attention does."""
