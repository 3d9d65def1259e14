"""Nouns of the toolkit: types, protocols, typed configuration, files, devices, errors. Imports nothing of ours."""
