"""Toy corpus of the quickstart: its scenes, what is said about them, and its file formats."""
