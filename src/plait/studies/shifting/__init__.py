"""What the study of domain shifts does."""
