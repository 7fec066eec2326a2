"""Recipes: one file each, to run, to import and to start from."""
