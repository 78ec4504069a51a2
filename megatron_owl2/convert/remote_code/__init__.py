"""Modelling code for transformers 5 that an exported directory carries (trust_remote_code).

These modules are copied as they are, so they import nothing of this package but each other. Three
of them are links to the modules that read training's images.
"""
