"""What of a sample is hidden, so that a model learns to find it."""
