"""What the study of position codes does: codes, tasks, a small reader, and measures of topology."""
