"""torchrun tests/helpers/resave.py CKPT OUTPUT TENSOR PIPELINE: load with these sizes and save."""

import sys

import prepared  # noqa: F401

from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.training.checkpoint import directories, save_load

source, output, tensor, pipeline = sys.argv[1:]
config = directories.read_config(source)
config.parallel.tensor, config.parallel.pipeline = int(tensor), int(pipeline)
groups = setup.initialize(config.parallel)
model = Owl2(ParallelContext(config, groups), config.model)
save_load.load_weights(source, [model])
save_load.save(output, [model], config)
