"""Activation memory and collectives of a micro-batch, from passes without storage.

The model runs forward and backward on torch's meta device, in a fake process group; every live
storage and every collective is counted (live_memory.py). So whatever the code of the model keeps
is what is counted, with recomputation and frozen weights as they are. Two layers of each stack
tell what one costs; the rest is multiplication.
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core import parallel_state

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.mcore.parallel import ParallelContext, layers_per_stage
from megatron_owl2.model.layer_stack import LayerStack
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.model.parts import STACKS, part_of
from megatron_owl2.planner.fake_process_groups import fake_process_groups
from megatron_owl2.planner.live_memory import LiveMemory, Moment
from megatron_owl2.planner.meta_device import (
    build_on_meta_device,
    run_on_meta_device,
)
from megatron_owl2.planner.static_memory import Weight, with_local_kernels
from megatron_owl2.training import parameter_groups

LAYERS = 2  # of each stack in the model that is run


@dataclass(frozen=True)
class PipelineStageCost:
    """Bytes of one micro-batch in one pipeline stage.

    `kept` lives from its forward to its backward pass; `working` is the most that lives beside
    `kept` in either pass; `shared` stays, for all micro-batches together (megatron-core's gather
    buffer); `sent` is what a rank sends in both passes, by group ("tensor", "context").
    """

    kept: int
    working: int
    shared: int
    sent: Counter[str]


@dataclass(frozen=True)
class ActivationCost:
    """Bytes kept and sent by the segments of the forward pass, and the peak beside them by phase.

    Segments are "begin" (all before the decoder, with the batch), "decoder ends", "head", and one
    layer of each of `parts.STACKS`. Of the phases "begin" and "decoder" are measured from what is
    kept before the head, "head" from all that is kept. `batch` is what every pipeline stage has of
    a batch, which is all but the images; `received` are the hidden states from the pipeline stage
    before.
    """

    kept: dict[str, int]
    sent: dict[str, Counter[str]]
    working: dict[str, int]
    batch: int
    received: int
    shared: int

    def pipeline_stage(self, layers: dict[str, int], first: bool, last: bool) -> PipelineStageCost:
        """The cost of a pipeline stage with so many layers of each stack, the first or the last
        of the pipeline or both."""
        counts = Counter({"decoder ends": 1, "begin": int(first), "head": int(last), **layers})
        sent: Counter[str] = Counter()
        for segment, count in counts.items():
            sent.update(_times(count, self.sent[segment]))
        kept = sum(self.kept[segment] * count for segment, count in counts.items())
        working = [self.working["decoder"] - (self.kept["head"] if last else 0)]
        working += [self.working["begin"] - (self.kept["head"] if last else 0)] * first
        working += [self.working["head"]] * last
        return PipelineStageCost(
            kept=kept + (0 if first else self.batch + self.received),
            working=max(0, *working),
            shared=self.shared,
            sent=sent,
        )


class ActivationCosts:
    """Costs of pipeline stages under any parallel configuration and with any number of rows.

    All configs asked for differ in nothing but `parallel` and the micro-batch. Passes run once for
    every combination of tensor, sequence and context parallelism and recomputation, with one row
    and with two, of `images` images each; all else follows from these.
    """

    def __init__(self, weights: Sequence[Weight], images: int = 1):
        self._images = images
        # Whether anything before the decoder trains, so that its input has a gradient anyway.
        self._fed = any(w.trained and part_of(w.name).pipeline == "first" for w in weights)
        self._measured: dict[tuple, list[ActivationCost]] = {}
        self._known: dict[tuple, PipelineStageCost] = {}

    def __call__(self, config: RunConfig, pipeline_stage: int) -> PipelineStageCost:
        """The cost of pipeline stage `pipeline_stage` of the config's pipeline."""
        parallel, rows = config.parallel, config.train.micro_batch_size
        key = parallel.tensor, parallel.sequence, parallel.context, parallel.recompute
        # Gradients are asked for across pipeline stages, whether anything trains there or not.
        received = parallel.pipeline > 1 and not self._fed
        key += (received,)
        counts = layers_per_stage(config)
        ends = pipeline_stage == 0, pipeline_stage == len(counts) - 1
        known = (*key, rows, counts[pipeline_stage], *ends)
        if known in self._known:
            return self._known[known]
        if key not in self._measured:
            self._measured[key] = measure_activations(
                config, (1, 2), images=self._images, received=received
            )
        layers = {"decoder": counts[pipeline_stage]}
        if pipeline_stage == 0:
            layers["vision_model"] = config.model.vision.num_layers
            layers["abstractor"] = config.model.abstractor.num_layers
        one, two = (cost.pipeline_stage(layers, *ends) for cost in self._measured[key])
        self._known[known] = found = PipelineStageCost(
            *(
                _grown(getattr(one, name), getattr(two, name), rows)
                for name in ("kept", "working", "shared")
            ),
            sent=Counter(
                {group: _grown(n, two.sent[group], rows) for group, n in one.sent.items()}
            ),
        )
        return found


def _grown(one: int, two: int, rows: int) -> int:
    """With `rows` rows, what is `one` with one row and `two` with two."""
    return one + (two - one) * (rows - 1)


def measure_activations(
    config: RunConfig, rows: Sequence[int], *, images: int = 1, received: bool = False
) -> list[ActivationCost]:
    """Costs of micro-batches of so many `rows`, each with `images`, in the config's parallelism.

    Attention is that of rows of one sample, which needs no less memory than that of packed rows.
    `received`: the decoder's input comes from another pipeline stage, which asks for its gradient.
    Raises RuntimeError in a process that is in a process group already. What the patterns of the
    training stage say of the first layers is taken to hold for all.
    """
    model, parallel = config.model, config.parallel
    small = replace(
        with_local_kernels(config),
        model=replace(
            model,
            vision=replace(model.vision, num_layers=LAYERS),
            abstractor=replace(model.abstractor, num_layers=LAYERS),
            decoder=replace(model.decoder, num_layers=LAYERS),
        ),
        parallel=replace(parallel, pipeline=1, virtual_pipeline=1, layers=[]),
    )
    size = parallel.tensor * parallel.context
    with fake_process_groups(small.parallel, size, 0) as groups:
        with build_on_meta_device():
            built = Owl2(ParallelContext(small, groups), small.model)
        for name, parameter in built.named_parameters():
            parameter.requires_grad = parameter_groups.is_trainable(name, small.stage)
            if parameter.requires_grad:  # the gradient buffers take it over
                parameter.register_post_accumulate_grad_hook(_forget)
        found = []
        for count in rows:
            parallel_state.get_global_memory_buffer().buffer.clear()
            with run_on_meta_device(), LiveMemory(built, groups) as live:
                found.append(_run(built, small, count, live, images, received=received))
        return found


def _forget(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _run(
    model: Owl2, config: RunConfig, rows: int, live: LiveMemory, images: int, *, received: bool
) -> ActivationCost:
    batch = example_batch(config, rows, images)
    given = live.kept
    moments = {"start": live.take()}
    hidden_state_bytes = 0

    def enter(_, inputs):
        nonlocal hidden_state_bytes
        x = inputs[0]
        if received and not x.requires_grad:
            x = x.detach().requires_grad_()
        moments["decoder begins"] = live.take()
        hidden_state_bytes = x.numel() * x.element_size()
        if x.requires_grad:
            x.register_hook(lambda _: moments.update({"decoder done": live.take()}))
        return x, *inputs[1:]

    def leave(_, inputs, y):
        moments["decoder ends"] = live.take()
        if y.requires_grad:
            y.register_hook(lambda _: moments.update({"head done": live.take()}))

    with contextlib.ExitStack() as hooks:
        stacks = {name: _StackProbe(getattr(model, name).layers, live, hooks) for name in STACKS}
        hooks.enter_context(model.decoder.register_forward_pre_hook(enter))
        hooks.enter_context(model.decoder.register_forward_hook(leave))
        output = model(*batch)
        kept = live.kept
        if output.requires_grad:
            torch.autograd.backward(output, torch.ones_like(output))
    end = live.take()
    layers = {name: stack.cost() for name, stack in stacks.items()}
    return _cost(
        moments,
        end,
        layers,
        kept=kept,
        batch=given - batch[1].numel(),
        received=hidden_state_bytes,
        shared=live.shared,
    )


def _cost(
    moments: dict[str, Moment],
    end: Moment,
    layers: dict[str, tuple[int, Counter[str]]],
    *,
    kept: int,
    batch: int,
    received: int,
    shared: int,
) -> ActivationCost:
    """The cost of a pass from its moments; `layers` has bytes kept and sent by one layer."""
    head_done = moments.get("head done", end)
    decoder_done = moments.get("decoder done", end)
    begins, ends = moments["decoder begins"], moments["decoder ends"]
    seen = {name: (LAYERS * kept, _times(LAYERS, sent)) for name, (kept, sent) in layers.items()}
    seen_before = [seen["vision_model"], seen["abstractor"]]
    decoder_sent = (ends.sent - begins.sent) + (decoder_done.sent - head_done.sent)
    begin_sent = begins.sent + (end.sent - decoder_done.sent)
    for _, sent in seen_before:
        begin_sent = begin_sent - sent
    return ActivationCost(
        kept={
            "begin": begins.kept - sum(kept for kept, _ in seen_before),
            "decoder ends": ends.kept - begins.kept - seen["decoder"][0],
            "head": kept - ends.kept,
            **{name: kept for name, (kept, _) in layers.items()},
        },
        sent={
            "begin": begin_sent,
            "decoder ends": decoder_sent - seen["decoder"][1],
            "head": head_done.sent - ends.sent,
            **{name: sent for name, (_, sent) in layers.items()},
        },
        # A moment has the peak since the one before it.
        working={
            "begin": max(begins.peak, end.peak if "decoder done" in moments else 0) - ends.kept,
            "decoder": max(ends.peak, decoder_done.peak if "head done" in moments else 0)
            - ends.kept,
            "head": head_done.peak - kept,
        },
        batch=batch,
        received=received,
        shared=shared,
    )


def example_batch(config: RunConfig, rows: int, images: int = 1) -> tuple[torch.Tensor, ...]:
    """The arguments of `Owl2.forward` for `rows` rows with `images` each, all zeros; all that is
    not an image is a target."""
    length, size = config.data.sequence_length, config.model.vision.image_size
    context, images = config.parallel.context, rows * images
    vision = images * config.model.tokens_per_image
    dropping = config.stage.lora.dropout or config.model.abstractor.attention_dropout
    samples = [torch.zeros(rows, dtype=torch.int64)] if dropping else []
    share = [torch.zeros(rows, length // context, dtype=torch.int64) for _ in range(3)]
    return (
        torch.zeros(rows, length, dtype=torch.int64),
        torch.zeros(images, 3, size, size, dtype=torch.uint8),
        torch.zeros(vision, dtype=torch.int64),
        *share,  # modality, positions, labels
        # The zig-zag order gives every rank its share of targets and vision, more or less.
        torch.zeros(-(-(rows * length - vision) // context), dtype=torch.int64),
        torch.zeros(-(-vision // context), dtype=torch.int64),
        *samples,  # of which only dropout asks
    )


def _times(count: int, sent: Counter[str]) -> Counter[str]:
    return Counter({group: n * count for group, n in sent.items()})


class _StackProbe:
    """Hooks that note what lives and what was sent where the layers of a stack begin and end."""

    def __init__(self, layers: LayerStack, live: LiveMemory, hooks: contextlib.ExitStack):
        self._live = live
        self._begin: dict[int, tuple[int, Counter[str]]] = {}  # by layer, in the forward pass
        self._end: dict[int, Counter[str]] = {}  # by layer, in the backward pass
        for number, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_pre_hook(partial(self._enter, number)))

    def _enter(self, number: int, layer: torch.nn.Module, inputs: tuple) -> None:
        if number in self._begin:  # computed again in the backward pass
            return
        self._begin[number] = self._live.kept, Counter(self._live.sent)
        if inputs[0].requires_grad:
            inputs[0].register_hook(partial(self._leave, number))

    def _leave(self, number: int, gradient: torch.Tensor) -> None:
        self._end[number] = Counter(self._live.sent)

    def cost(self) -> tuple[int, Counter[str]]:
        """Bytes kept and sent by the first layer; to be asked after both passes."""
        (kept, sent), (kept_then, sent_then) = self._begin[0], self._begin[1]
        total = sent_then - sent
        if 1 in self._end:  # else nothing trains up to here, and there is no backward pass
            total += self._end.get(0, self._live.sent) - self._end[1]
        return kept_then - kept, total
