"""Distilled sets: on disk, and in the forms other tools read."""
