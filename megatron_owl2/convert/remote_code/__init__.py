"""Modelling code for transformers 5 that exported directories carry (trust_remote_code).

A folder holds what a directory of its layout carries. These modules are copied as they are, so they
import nothing of this package but each other. What several programs need is there once, and links
lead to it: to the modules of `data` that read training's images, and from `owl1` to those of `owl2`
that both versions of the model share.
"""
