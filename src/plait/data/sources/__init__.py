"""Raw material of every kind to samples."""
