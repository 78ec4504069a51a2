"""Modules with parameters are called in the forward pass, not only read.

megatron-core waits for the parameters that other data-parallel ranks have updated where a module is
called (distributed_data_parallel.py); one whose parameters are read behind its back computes with
those of the step before.
"""

import pytest
import torch
from small_configs import run_config

from megatron_owl2.config.schema import LoraConfig, ParallelConfig
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.planner.activations import example_batch


@pytest.mark.parametrize("split", [["input_norm", "key_value", "mlp_norm"], []])
@pytest.mark.parametrize("targets", [[], ["*"], ["*.query", "*.value_text"]])
def test_every_module_with_parameters_is_called(split, targets):
    config = run_config(precision="fp32")
    config.model.decoder.modality_split = split
    config.stage.lora = LoraConfig(targets=targets, dropout=0.1)
    called = set()
    try:
        model = Owl2(ParallelContext(config, setup.initialize(ParallelConfig())), config.model)
        for module in model.modules():
            module.register_forward_pre_hook(lambda module, inputs: called.add(module))
        with torch.no_grad():
            model(*example_batch(config, 2))
    finally:
        setup.shutdown()
    silent = {
        name
        for name, module in model.named_modules()
        if module not in called and [*module.parameters(recurse=False)]
    }
    assert not silent
