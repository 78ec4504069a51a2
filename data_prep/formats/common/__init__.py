"""Helpers that the formats share: images named by paths, tables, tar files."""
