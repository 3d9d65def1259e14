"""What the study of fusions does."""
