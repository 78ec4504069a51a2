"""Command lines: the console command `owl2` and one module for each of its verbs.

A module holds what its verb parses and calls, and its `main(arguments, prog)`; tools/*.py run the
same functions from a checkout. torch and megatron-core are imported by the calls, not by the
parsers, so that help is there at once.
"""
