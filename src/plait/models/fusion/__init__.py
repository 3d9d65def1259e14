"""Several modalities → one: any number of them, each of which may be missing.

Every fusion takes a mapping from the name of a modality to its :class:`~plait.models.fusion.streams.Stream`, and gives
:class:`~plait.models.fusion.streams.Fused`. Where it stands is another choice than how it fuses:

- between encoders and joint layers (features): :class:`~plait.models.fusion.late.LateFusion` with light encoders;
- after whole towers (late): the same class with towers;
- inside towers: :class:`~plait.models.fusion.intermediate.Broadcast` puts any fusion after any block;
- over decisions: any fusion of the classifiers' scores, or the rules of :mod:`plait.models.fusion.decision`.
"""
