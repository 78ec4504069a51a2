"""Corpora that are published as addresses of images: selection of rows, downloads, mixtures."""
