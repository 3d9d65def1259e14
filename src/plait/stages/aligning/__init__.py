"""What the align stage does; loads torch, which the settings in :mod:`plait.stages.align` must not."""
