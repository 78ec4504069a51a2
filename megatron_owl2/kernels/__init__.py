"""Which library computes the decoder's layers: torch, or Transformer Engine in bf16 and FP8.

A library is a class with the same names: ColumnLinear, RowLinear, `attention`, `row_multiple`,
`around_layers`, `around_layer` and `checkpoint`. ViT and abstractor always run on torch.

So do the norms. What Transformer Engine's are faster by is the cast to FP8 in the norm's kernel,
and between a split norm and that cast stands the choice of the weight by modality; without it
torch's rms_norm is one fused kernel too. And it rounds to bf16 before the weight, as LLaMA does.
"""

from megatron_owl2.mcore import Layout


def of(layout: Layout):
    """The kernels that `kernels.backend` names, for the layout's precision."""
    if layout.backend == "transformer_engine":
        from megatron_owl2.kernels.transformer_engine import TransformerEngineKernels

        return TransformerEngineKernels(layout)
    from megatron_owl2.kernels.local import LocalKernels

    return LocalKernels()
