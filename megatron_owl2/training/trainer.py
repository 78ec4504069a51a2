"""A training run from start to end."""

import math
import sys
from functools import partial
from pathlib import Path

import torch

from megatron_owl2.config.load import save_config
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.data import bad_samples
from megatron_owl2.data.loader import build_loader
from megatron_owl2.data.sampling import phases
from megatron_owl2.data.shards.dataset import open_sources
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import CheckpointError, ConfigError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import build
from megatron_owl2.training import fault_tolerance, parameter_groups
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training.checkpoint import save_load
from megatron_owl2.training.checkpoint.manager import CheckpointManager
from megatron_owl2.training.data_iterator import DataIterator
from megatron_owl2.training.metrics import metrics, sample_sheet
from megatron_owl2.training.metrics.accumulator import without_sources
from megatron_owl2.training.metrics.grad_norms import GradNormsByGroup
from megatron_owl2.training.metrics.wandb_logger import WandbLogger
from megatron_owl2.training.profiling import Profiler, Timers
from megatron_owl2.training.sample_consistency import SampleConsistencyCheck
from megatron_owl2.training.signals import StopSignal
from megatron_owl2.training.step import forward_backward, update


def train(config: RunConfig, stop: StopSignal) -> int:
    """Train until `train.steps`, continuing from the run directory's latest checkpoint if any.

    Returns 0, or the number of the signal that ended the run early (after a checkpoint). Every
    rank of the job calls it; `validate.validate` must have passed.
    """
    output = Path(config.train.output)
    # A rank that hangs is for the watchdog to show, before those that wait for it give up.
    patience = max(30, math.ceil(config.health.step_timeout / 60) + 5)
    groups = setup.initialize(config.parallel, timeout_minutes=patience)
    main = torch.distributed.get_rank() == 0
    say = print if main else _silent
    say(_where(), flush=True)

    try:
        tokenizer = Tokenizer(config.data.tokenizer)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if tokenizer.vocab_size > config.model.decoder.vocab_size:
        raise ConfigError(
            f"model.decoder.vocab_size is {config.model.decoder.vocab_size}, but "
            f"{config.data.tokenizer} has {tokenizer.vocab_size} pieces; name the model's own "
            "tokenizer, or set the size if the model is new"
        )

    torch.manual_seed(config.train.seed + groups.pp.rank())
    context = ParallelContext(config, groups, fuses_gradients=True)
    chunks = build(context, config.model, config.parallel.virtual_pipeline)
    for chunk in chunks:
        chunk.to(setup.device())
    plan = parameter_groups.freeze(config, chunks)
    say(parameter_groups.summary(plan, config), flush=True)
    resumed = save_load.latest(output)
    if resumed is None and config.stage.initial_checkpoint is not None:
        save_load.load_weights(Path(config.stage.initial_checkpoint), chunks)
        say(f"weights from {config.stage.initial_checkpoint}", flush=True)
    elif resumed is None and (frozen := sum(p.numel for p in plan if not p.trained)):
        say(
            f"warning: {frozen:,} parameters that this stage does not train stay random, for "
            "stage.initial_checkpoint is not set",
            file=sys.stderr,
            flush=True,
        )
    wrapped = optim.wrap_ddp(chunks, overlap=config.parallel.overlap)
    optimizer, scheduler = optim.build_optimizer(config, wrapped)

    trained = parameter_groups.fingerprint(plan)
    datasets = open_sources(config.data)
    step = sample_indices = 0
    counts, health_state = {}, None
    if resumed is None:
        data = [phases.first_phase(config.data, datasets)]
    else:
        progress = save_load.read_progress(resumed)
        if progress["stage_fingerprint"] != trained:
            raise ConfigError(
                "stage.trainable, stage.rates or optimizer.vision_layer_decay is not what "
                f"{resumed} was made with; go on with the same, or start another run from it with "
                "stage.initial_checkpoint"
            )
        step, sample_indices, counts = progress["step"], progress["slots"], progress["counts"]
        health_state = progress["health"]
        data = phases.resume(
            progress["phases"], config.data, datasets, sample_indices, str(resumed)
        )
        if len(data) > len(progress["phases"]):
            counts = without_sources(counts)
        save_load.load_training(resumed, chunks, optimizer, scheduler)
        say(f"continuing from {resumed} at step {step}", flush=True)
    say(data[-1].describe(), flush=True)
    if main:
        output.mkdir(parents=True, exist_ok=True)
        save_config(config, output / "run.yaml")
        metrics.drop_after(output, step)
        bad_samples.drop_after(output, sample_indices)
        fault_tolerance.drop_after(output, step)
    torch.distributed.barrier()  # no rank writes its ledger before it was cut

    # Of the ranks that read the same samples, one keeps the ledger.
    first = groups.mp.rank() == 0 and groups.cp.rank() == 0
    per_rank = config.train.global_batch_size // groups.dp.size()
    micro_batches = per_rank // config.train.micro_batch_size
    loader = build_loader(
        config.data,
        datasets,
        data[-1],
        tokenizer=tokenizer,
        tokens_per_image=config.model.tokens_per_image,
        image_size=config.model.vision.image_size,
        micro_batch_size=config.train.micro_batch_size,
        start_sample=sample_indices,
        data_parallel_rank=groups.dp.rank(),
        data_parallel_size=groups.dp.size(),
        decode_images=chunks[0].pre_process,
        bad_sample_log=bad_samples.path_of(output, torch.distributed.get_rank()) if first else None,
    )
    agreement = SampleConsistencyCheck([groups.mp, groups.cp], setup.device())
    feed = DataIterator(loader, setup.device(), agreement, (groups.cp.rank(), groups.cp.size()))
    gradients = fault_tolerance.GradientSpikeGuard(config.health, output, health_state, writes=main)
    watchdog = fault_tolerance.Watchdog(
        config.health.step_timeout, output, torch.distributed.get_rank()
    )
    # One rank of every pipeline stage shows all there is to see.
    first_of_stage = groups.tp.rank() == groups.cp.rank() == groups.dp.rank() == 0
    profiler = Profiler(config.watch, output, records=first_of_stage)
    timers = context.transformer.timers = Timers(profiler)
    part_norms = GradNormsByGroup(wrapped, optimizer, config.model.decoder)
    tracker = WandbLogger(config, writes=main)
    log = metrics.Metrics(
        config,
        setup.device(),
        tracker,
        start_step=step,
        counts=counts,
        sources=data[-1].sources,
        trained={parameter.name for parameter in plan if parameter.trained},
        stage=groups.pp.rank(),
    )
    saver = CheckpointManager(output, config.train, partial(say, flush=True))
    received = 0

    while step < config.train.steps and not received:
        step += 1
        watchdog.begin(f"step {step}")
        profiler.begin_step(step)
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        sums = forward_backward(config, wrapped, feed, micro_batches)
        received = stop.reduce(setup.device())
        ending = step == config.train.steps or received
        saving = ending or step % config.train.save_interval == 0
        logging = saving or step % config.train.log_interval == 0  # checkpoints carry full counts
        scheduler.step(1)
        read = range(sample_indices, sample_indices + config.train.global_batch_size)
        with profiler.span("optimizer"):
            judge = partial(gradients.should_apply, step, read)
            try:
                norm, by_part = update(optimizer, judge, part_norms if logging else None)
            except FloatingPointError as error:  # on all ranks
                watchdog.begin("the last save")  # the run can go on from what is being saved
                try:
                    saver.wait()
                except CheckpointError as failure:
                    raise error from failure
                raise
        sample_indices = read.stop
        log.add(sums, feed.take_counts(), timers.backward.take())
        saver.poll()
        if logging:
            agreement.check(step)
            log.write(
                step,
                grad_norm=norm,
                part_norms=by_part,
                rates=parameter_groups.learning_rates(plan, scheduler, config),
                skipped=gradients.state["skipped"],
            )
        interval = config.watch.picture_interval
        if main and interval and step % interval == 0:
            tracker.picture("samples", sample_sheet.write(output, step, feed.last, tokenizer), step)
        if saving:
            profiler.begin("checkpoint")
            optim.sync_params(wrapped)
            saver.save(
                step,
                chunks,
                config,
                optimizer=optimizer,
                scheduler=scheduler,
                progress={
                    "step": step,
                    "slots": sample_indices,
                    "phases": phases.to_json(data),
                    "stage_fingerprint": trained,
                    "counts": log.counts,
                    "health": gradients.state,
                },
            )
            profiler.end()
        profiler.end_step()
    saver.wait()
    watchdog.end()
    profiler.close()
    feed.close()
    tracker.close()
    setup.shutdown()
    return received if step < config.train.steps else 0


def _where() -> str:
    """How many ranks there are, on what, and how they talk."""
    ranks, backend = torch.distributed.get_world_size(), torch.distributed.get_backend()
    device = "CPU" if setup.on_cpu() else torch.cuda.get_device_name()
    return f"{ranks} rank{'s' if ranks > 1 else ''} on {device}, {backend}"


def _silent(*args, **kwargs) -> None:
    pass
