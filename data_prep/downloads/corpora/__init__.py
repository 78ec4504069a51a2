"""Published corpora whose images must be downloaded: one module for each, found by `registry`.

A new corpus is one new file here that defines `CORPUS = Corpus(...)`.
"""
