"""What the study of connectors does; its settings are :class:`plait.studies.connectors.ConnectorStudy`."""
