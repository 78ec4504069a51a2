"""The benchmarks, one module each; `evaluation.registry` finds every module of this package."""
