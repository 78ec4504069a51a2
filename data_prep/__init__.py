"""Readers of published corpora: `plan` cuts an input into parts, `read` turns one into records."""
