"""Which library computes the decoder's layers: torch, or Transformer Engine in bf16 and FP8.

A library is a class with the same names: ColumnLinear, RowLinear, Attention, `row_multiple`,
`around_layers`, `around_layer` and `checkpoint`. ViT and abstractor always run on torch.
"""

from megatron_owl2.mcore import Layout


def of(layout: Layout):
    """The kernels that `kernels.backend` names, for the layout's precision."""
    if layout.backend == "transformer_engine":
        from megatron_owl2.kernels.transformer_engine import TransformerEngineKernels

        return TransformerEngineKernels(layout)
    from megatron_owl2.kernels.local import LocalKernels

    return LocalKernels()
