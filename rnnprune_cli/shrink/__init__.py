"""Removing hidden units, or whole layers: the smaller model, and what was verified of it."""
