"""Set-up of a process for megatron-core, done by importing this before anything else of it."""

from megatron_owl2.mcore.setup import setup

setup()
