"""Claims of the field, tried: one file a family of claims."""
