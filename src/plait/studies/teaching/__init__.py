"""What the study of training does; its settings are :class:`plait.studies.training.TrainingStudy`."""
