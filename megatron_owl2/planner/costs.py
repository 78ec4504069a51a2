"""Costs of one run under any parallel configuration, each computed once."""

from collections import Counter
from dataclasses import replace

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.model import flops
from megatron_owl2.model.parts import FLOPS_GROUPS
from megatron_owl2.planner.activations import ActivationCosts
from megatron_owl2.planner.elementwise import ElementwiseTraffic
from megatron_owl2.planner.row_images import mean_images, most_images
from megatron_owl2.planner.static_memory import StaticMemory, model_weights, static_memory


class RunCosts:
    """Weights, memory, FLOPs and traffic of one run on `world_size` GPUs.

    Memory is that of full rows; all else is of rows of `mean_length` positions, which is
    `data.sequence_length` unless micro-batches are cut to their longest row; `tokens` of these are
    not padding, all of them without it. Of packed rows memory is that of as many images as a row
    may have, all else that of the mean (row_images.py). The configs that its methods take differ
    from the given one in nothing but `parallel` and the micro-batch, so that the search for
    parallel configurations computes nothing twice.
    """

    def __init__(
        self,
        config: RunConfig,
        world_size: int,
        *,
        tokens: int | None = None,
        mean_length: int | None = None,
    ):
        self.world_size = world_size
        self.mean_length = mean_length or config.data.sequence_length
        self.padded_share = 1 - (tokens or self.mean_length) / self.mean_length
        self.weights = model_weights(config)
        self.trained = frozenset(weight.name for weight in self.weights if weight.trained)
        most, mean = most_images(config), mean_images(config)
        self.activations = ActivationCosts(self.weights, most)
        same = self.mean_length == config.data.sequence_length and most == mean
        self._mean_activations = self.activations if same else ActivationCosts(self.weights, mean)
        self.elementwise = ElementwiseTraffic(config.train.micro_batch_size)
        self._static: dict[tuple, list[StaticMemory]] = {}
        self._flops: dict[tuple, tuple[dict[str, float], ...]] = {}

    def shortened(self, config: RunConfig) -> RunConfig:
        """The config with rows of `mean_length`, rounded up to what its ranks can share."""
        parallel, full = config.parallel, config.data.sequence_length
        multiple = 2 * parallel.tensor * parallel.context
        length = min(full, -(-self.mean_length // multiple) * multiple)
        return replace(config, data=replace(config.data, sequence_length=length))

    def sent(self, config: RunConfig, pipeline_stage: int) -> Counter[str]:
        """Bytes that a rank sends in both passes of a micro-batch, by group."""
        return self._mean_activations(self.shortened(config), pipeline_stage).sent

    def static_memory(self, config: RunConfig) -> list[StaticMemory]:
        """Static memory of the ranks of every pipeline rank, from the first step to the last."""
        parallel = config.parallel
        key = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, *parallel.layers
        if key not in self._static:
            self._static[key] = static_memory(config, self.world_size, self.weights)
        return self._static[key]

    def micro_batch_flops(self, config: RunConfig) -> tuple[dict[str, float], ...]:
        """FLOPs of a micro-batch forward, backward and of what is computed again, by FLOPS_GROUPS.
        Padding counts like tokens."""
        rows, recompute = config.train.micro_batch_size, config.parallel.recompute
        if (rows, recompute) not in self._flops:
            load = full_load(config, rows, self.mean_length)
            model, lora = config.model, config.stage.lora
            forward = flops.training_flops(model, load, set(), lora)
            both = flops.training_flops(model, load, self.trained, lora)
            again = flops.forward_again(model, load, self.trained, recompute, lora)
            backward = {g: both[g] - forward[g] for g in FLOPS_GROUPS}
            self._flops[rows, recompute] = forward, backward, again
        return self._flops[rows, recompute]

    def micro_batches(self, config: RunConfig) -> int:
        """Number of micro-batches of a data-parallel rank in a step."""
        rows = config.train.micro_batch_size * self.data_parallel(config)
        return config.train.global_batch_size // rows

    def data_parallel(self, config: RunConfig) -> int:
        """Number of groups of ranks that read samples of their own."""
        parallel = config.parallel
        return self.world_size // (parallel.tensor * parallel.pipeline * parallel.context)


def full_load(config: RunConfig, rows: int, tokens: int | None = None) -> flops.Load:
    """Rows with the mean of images each, of `tokens` tokens; without it as long as they may be. All
    that is no image is learnt, as of a caption. A packed row counts as one sample, which is more
    attention than that of its samples."""
    length = config.data.sequence_length if tokens is None else tokens
    images = rows * mean_images(config)
    vision = images * config.model.tokens_per_image
    return flops.Load(
        images=images,
        tokens=rows * length,
        vision_tokens=vision,
        targets=rows * length - vision,
        pairs=rows * length * (length + 1) // 2,
    )
