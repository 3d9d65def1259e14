"""What the tune stage does; loads torch, which the settings in :mod:`plait.stages.tune` must not."""
