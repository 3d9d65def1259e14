"""Recipes: YAML files, each one run."""
