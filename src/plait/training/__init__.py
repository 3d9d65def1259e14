"""Loss to update to checkpoint."""
