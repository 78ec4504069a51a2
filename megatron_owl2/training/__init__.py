from megatron_owl2 import mcore  # noqa: F401  the CPU stand-in comes before megatron.core
