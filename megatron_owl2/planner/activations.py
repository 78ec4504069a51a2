"""What a micro-batch keeps alive for its backward pass, and what it sends, by running it without
storage.

The model runs forward and backward on torch's fake tensors, which have shapes and no data, in a
fake process group; every storage that lives and every collective is counted. So whatever the code
of the model keeps is what is counted, with recomputation and frozen weights as they are. Two layers
of each kind tell what one costs; the rest is multiplication.
"""

import itertools
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._C._distributed_c10d import ProcessGroup
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.mcore.parallel import ParallelContext, layers_per_stage
from megatron_owl2.model.layer_stack import LayerStack
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.planner.fake_process_groups import fake_process_groups
from megatron_owl2.planner.static_memory import Weight, with_local_kernels
from megatron_owl2.training import parameter_groups

STACKS = ("vision_model", "abstractor", "decoder")
LAYERS = 2  # of each stack in the model that is run


@dataclass(frozen=True)
class StageCost:
    """Of one micro-batch in one stage of the pipeline, in bytes.

    `kept` lives from its forward to its backward pass; `working` is the most that lives beside
    `kept` in either pass; `shared` stays, for all micro-batches together (megatron-core's gather
    buffer); `sent` is what a rank sends in both passes, by group ("tensor", "context").
    """

    kept: int
    working: int
    shared: int
    sent: Counter


@dataclass(frozen=True)
class ActivationCost:
    """Bytes kept and sent by the parts of the model, and the most beside what is kept, by phase.

    Parts are "begin" (all before the decoder, with the batch), "decoder ends", "head", and one
    layer of each of STACKS. Of the phases "begin" and "decoder" are measured from what is kept
    before the head, "head" from all that is kept.
    """

    kept: dict[str, int]
    sent: dict[str, Counter]
    working: dict[str, int]
    batch: int  # what every stage has of a batch: no pictures
    received: int  # hidden states from the stage before
    shared: int

    def stage(self, layers: dict[str, int], first: bool, last: bool) -> StageCost:
        """A stage with so many layers of each of STACKS, the first or the last one or both."""
        parts = Counter({"decoder ends": 1, "begin": int(first), "head": int(last), **layers})
        sent = Counter()
        for part, count in parts.items():
            sent.update({group: n * count for group, n in self.sent[part].items()})
        kept = sum(self.kept[part] * count for part, count in parts.items())
        working = [self.working["decoder"] - (self.kept["head"] if last else 0)]
        working += [self.working["begin"] - (self.kept["head"] if last else 0)] * first
        working += [self.working["head"]] * last
        return StageCost(
            kept=kept + (0 if first else self.batch + self.received),
            working=max(0, *working),
            shared=self.shared,
            sent=sent,
        )


class ActivationCosts:
    """What stages cost in any layout and with any number of rows; each layout is run once.

    All configs asked for differ in nothing but `parallel` and the micro-batch.
    """

    def __init__(self, weights: Sequence[Weight]):
        begin = ("vision_model.", "abstractor.", "embedding.")
        self._fed = any(w.trained and w.name.startswith(begin) for w in weights)
        self._known = {}

    def __call__(self, config: RunConfig, stage: int) -> StageCost:
        """The cost of stage number `stage` of the config's pipeline."""
        parallel, rows = config.parallel, config.train.micro_batch_size
        key = parallel.tensor, parallel.sequence, parallel.context, parallel.recompute
        # A stage asks the one before it for gradients, whether anything trains there or not.
        received = parallel.pipeline > 1 and not self._fed
        key += (received,)
        if key not in self._known:
            self._known[key] = tuple(
                measure_activations(config, n, received=received) for n in (1, 2)
            )
        counts = layers_per_stage(config)
        layers = {"decoder": counts[stage]}
        if stage == 0:
            layers["vision_model"] = config.model.vision.num_layers
            layers["abstractor"] = config.model.abstractor.num_layers
        ends = stage == 0, stage == len(counts) - 1
        one, two = (measured.stage(layers, *ends) for measured in self._known[key])
        return StageCost(
            *(
                _grown(getattr(one, name), getattr(two, name), rows)
                for name in ("kept", "working", "shared")
            ),
            Counter({group: _grown(n, two.sent[group], rows) for group, n in one.sent.items()}),
        )


def _grown(one: int, two: int, rows: int) -> int:
    """With `rows` rows, what is `one` with one row and `two` with two."""
    return one + (two - one) * (rows - 1)


def measure_activations(config: RunConfig, rows: int, *, received: bool = False) -> ActivationCost:
    """Run `rows` rows, each with a picture, through a small model in the config's layout.

    `received`: the decoder's input comes from another stage, which asks for its gradient.
    Raises RuntimeError in a process that is in a process group already. What the patterns of the
    stage say of the first layers is taken to hold for all.
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
    with fake_process_groups(small.parallel, size, 0) as groups, FakeTensorMode():
        context = ParallelContext(small, groups)
        built = Owl2(context, small.model)
        for name, parameter in built.named_parameters():
            parameter.requires_grad = parameter_groups.is_trainable(name, small.stage)
            if parameter.requires_grad:  # the gradient buffers take it over
                parameter.register_post_accumulate_grad_hook(_forget)
        with _LiveMemory(built, groups) as live:
            return _run(built, small, rows, live, received=received)


def _forget(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None


def _run(
    model: Owl2, config: RunConfig, rows: int, live: "_LiveMemory", *, received: bool
) -> ActivationCost:
    batch = _batch(config, rows)
    given = live.kept
    stacks = {name: _Stack(getattr(model, name).layers, live) for name in STACKS}
    points = {"start": live.take()}

    def enter(_, inputs):
        x = inputs[0]
        if received and not x.requires_grad:
            x = x.detach().requires_grad_()
        points["decoder begins"] = live.take()
        points["hidden states"] = x.numel() * x.element_size()
        if x.requires_grad:
            x.register_hook(lambda _: points.update({"decoder done": live.take()}))
        return x, *inputs[1:]

    def leave(_, inputs, y):
        points["decoder ends"] = live.take()
        if y.requires_grad:
            y.register_hook(lambda _: points.update({"head done": live.take()}))

    model.decoder.register_forward_pre_hook(enter)
    model.decoder.register_forward_hook(leave)
    output = model(*batch)
    kept = live.kept
    if output.requires_grad:
        torch.autograd.backward(output, torch.ones_like(output))
    end = live.take()
    head_done = points.get("head done", end)
    decoder_done = points.get("decoder done", end)
    begins, ends = points["decoder begins"], points["decoder ends"]

    layers = {name: stack.cost() for name, stack in stacks.items()}
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
        # `live.take` gives the peak since the point before it.
        working={
            "begin": max(begins.peak, end.peak if "decoder done" in points else 0) - ends.kept,
            "decoder": max(ends.peak, decoder_done.peak if "head done" in points else 0)
            - ends.kept,
            "head": head_done.peak - kept,
        },
        batch=given - batch[1].numel(),
        received=points["hidden states"],
        shared=live.shared,
    )


def _batch(config: RunConfig, rows: int) -> tuple[torch.Tensor, ...]:
    """The arguments of `Owl2.forward` for `rows` rows with a picture each."""
    length, size = config.data.sequence_length, config.model.vision.image_size
    context, vision = config.parallel.context, rows * config.model.tokens_per_image
    share = [torch.zeros(rows, length // context, dtype=torch.int64) for _ in range(3)]
    return (
        torch.zeros(rows, length, dtype=torch.int64),
        torch.zeros(rows, 3, size, size, dtype=torch.uint8),
        torch.zeros(vision, dtype=torch.int64),
        *share,  # modality, positions, labels
        # Zig-zag chunks give every rank its share of the vision tokens, more or less.
        torch.zeros(-(-vision // context), dtype=torch.int64),
    )


def _times(count: int, sent: Counter) -> Counter:
    return Counter({group: n * count for group, n in sent.items()})


@dataclass(frozen=True)
class _Point:
    """What lives at a moment, the most that lived since the one before, what was sent so far."""

    kept: int
    peak: int
    sent: Counter


class _Stack:
    """Notes what lives and what was sent where the first layers of a stack begin and end."""

    def __init__(self, layers: LayerStack, live: "_LiveMemory"):
        self._living = live
        self._begin, self._end = {}, {}  # by number of the layer: of its forward, of its backward
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._enter, number))

    def _enter(self, number, layer, inputs):
        if number in self._begin:  # computed again in the backward pass
            return
        self._begin[number] = self._living.kept, Counter(self._living.sent)
        if inputs[0].requires_grad:
            inputs[0].register_hook(partial(self._leave, number))

    def _leave(self, number, gradient):
        self._end[number] = Counter(self._living.sent)

    def cost(self) -> tuple[int, Counter]:
        """Bytes kept and sent by the first layer; to be asked after both passes."""
        (kept, sent), (kept_then, sent_then) = self._begin[0], self._begin[1]
        total = sent_then - sent
        if 1 in self._end:  # else nothing trains up to here, and there is no backward pass
            total += self._end.get(0, self._living.sent) - self._end[1]
        return kept_then - kept, total


class _LiveMemory(TorchDispatchMode):
    """Count of the bytes of storages that live beside the model's, and of collectives by group."""

    def __init__(self, model: torch.nn.Module, groups: ProcessGroupCollection):
        super().__init__()
        self._groups = {groups.tp.group_name: "tensor", groups.cp.group_name: "context"}
        held = itertools.chain(model.parameters(), model.buffers())
        self._alive = {tensor.untyped_storage()._cdata: None for tensor in held}
        self._now = self._peak = 0
        self.sent = Counter()

    @property
    def shared(self) -> int:
        """Bytes of megatron-core's gather buffer, which stays."""
        buffers = parallel_state.get_global_memory_buffer().buffer.values()
        return sum(buffer.untyped_storage().nbytes() for buffer in buffers)

    @property
    def kept(self) -> int:
        return self._now - self.shared

    def take(self) -> _Point:
        """This moment, without what is shared; the next peak begins here."""
        point = _Point(self.kept, self._peak - self.shared, Counter(self.sent))
        self._peak = self._now
        return point

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            self._send(function._opname, args)
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self._add(result.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def drop(_):
            del self._alive[key]
            self._now -= size

        self._alive[key] = weakref.ref(storage, drop)
        self._now += size
        self._peak = max(self._peak, self._now)

    def _send(self, name: str, args: tuple) -> None:
        """What a ring sends per rank: all but its own part, and twice that to reduce for all."""
        if name not in _RING:
            raise RuntimeError(f"a collective that the plan cannot count: {name}")
        argument, times = _RING[name]
        group = next(ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        tensors = tree_leaves(args[argument])
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.sent[self._groups[group.group_name]] += (
            size * times * (group.size() - 1) // group.size()
        )


# Which argument of a collective is the whole, and how often a rank sends its share of it.
_RING = {"allreduce_": (0, 2), "_allgather_base_": (0, 1), "_reduce_scatter_base_": (1, 1)}
