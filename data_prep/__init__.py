"""Preparation of data: from published corpora, and downloads of their images, to data sets."""
