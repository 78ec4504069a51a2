"""mPLUG-Owl2 on megatron-core: pre-training, instruction tuning, conversion and inference."""
