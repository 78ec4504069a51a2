"""torchrun tests/resave.py CKPT OUTPUT TENSOR PIPELINE: load under a layout and save from it."""

import sys

from megatron_owl2 import mcore
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.training import checkpoint

source, output, tensor, pipeline = sys.argv[1:]
config = checkpoint.read_config(source)
config.parallel.tensor, config.parallel.pipeline = int(tensor), int(pipeline)
groups = mcore.initialize(config.parallel)
model = Owl2(mcore.Layout(config, groups), config.model)
checkpoint.load_weights(source, [model])
checkpoint.save(output, [model], config)
