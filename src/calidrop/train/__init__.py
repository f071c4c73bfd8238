"""Offline procedures: what some methods learn from a model once, kept in a file."""
