"""Trainer of one stage: model, data and observers from a configuration, and the training loop."""

import logging
import math
import os
import time
from pathlib import Path
from types import TracebackType

import torch

from megatron_owl2.config.machine import warn_of_slow_settings
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.config.validate import check_steps, validate
from megatron_owl2.data import bad_samples
from megatron_owl2.data.loader import build_loader
from megatron_owl2.data.row_length import row_alignment
from megatron_owl2.data.sample_builder import SampleBuilder
from megatron_owl2.data.tokenizer import load_tokenizer
from megatron_owl2.errors import CheckpointError, ConfigError, DivergedError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.host_group import model_group_on_host
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.kernels.user_buffers import user_buffers
from megatron_owl2.model.owl2 import build
from megatron_owl2.training import fault_tolerance, parameter_groups
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training.checkpoint import directories, save_load
from megatron_owl2.training.checkpoint.manager import CheckpointManager
from megatron_owl2.training.data_iterator import DataIterator
from megatron_owl2.training.garbage_collection import GarbageCollection
from megatron_owl2.training.initial_weights import load_initial_weights
from megatron_owl2.training.metrics import metrics, sample_sheet
from megatron_owl2.training.metrics.accumulator import without_sources
from megatron_owl2.training.metrics.data_report import write_data_report
from megatron_owl2.training.metrics.grad_norms import GradNormsByGroup
from megatron_owl2.training.metrics.wandb_logger import WandbLogger
from megatron_owl2.training.model_settings import check_resumed
from megatron_owl2.training.profiling import Profiler, Timers
from megatron_owl2.training.run_data import open_run_data
from megatron_owl2.training.run_directory import run_directory, set_back
from megatron_owl2.training.sample_consistency import SampleConsistencyCheck
from megatron_owl2.training.signals import StopSignal
from megatron_owl2.training.state import TrainState
from megatron_owl2.training.step import forward_backward, gradient_norm, update
from megatron_owl2.training.validation import Validator, open_validation
from megatron_owl2.utils.closing import Closing

_logger = logging.getLogger(__name__)


class Trainer:
    """Training of one stage on all ranks of a job; every rank makes one and calls `train`.

    Subclasses may replace any of the methods that `train` and `train_step` call. Without `stop`
    the signals of signals.SIGNALS are taken over from here on. Raises ConfigError for a
    configuration that cannot run here.
    """

    def __init__(self, config: RunConfig, stop: StopSignal | None = None):
        setup.setup()
        validate(config, int(os.environ.get("WORLD_SIZE", "1")))
        self.config, self.stop = config, stop or StopSignal()
        self.output = Path(config.train.output)
        self.state = TrainState()
        self.signal = 0  # that ends the run early
        self._closing = Closing()

    def train(self) -> int:
        """Train until `train.steps`, continuing from the run's latest checkpoint if there is one.

        Returns 0, or the number of the signal that ended the run early (after a checkpoint).
        """
        with self:
            self.start()
            self.open_data()
            self.build_model()
            self.resume()
            self.build_data()
            self.build_observers()
            self.garbage = self._closing.enter_context(GarbageCollection())
            while self.state.step < self.config.train.steps and not self.signal:
                self.train_step()
            self.checkpoints.wait()
            if self.main and self.state.step >= self.config.train.steps:
                self.report_data()
            self.watchdog.end()  # closing what watches the run may take its time
        return self.signal if self.state.step < self.config.train.steps else 0

    def train_step(self) -> None:
        """One optimizer step, and what is due after it: metrics, validation, a checkpoint."""
        state, config = self.state, self.config
        state.step += 1
        self.watchdog.begin(f"step {state.step}")
        self.profiler.begin_step(state.step)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self.forward_backward()
        received = self.stop.reduce(setup.device())
        norm = self.gradient_norm()
        self.signal = int(received)  # the device has come past it, so this waits for nothing
        ending = state.step == config.train.steps or self.signal != 0
        saving = ending or state.step % config.train.save_interval == 0
        validating = self.validator.due(state.step)
        if validating and self.signal:  # a run that a signal ends has no time for it
            _logger.warning("no validation after step %d: a signal ends the run", state.step)
            validating = False
        # Checkpoints carry full counts, so a row comes before each.
        logging_due = saving or validating or state.step % config.train.log_interval == 0
        self.scheduler.step(1)
        norms = self.grad_norms.measure() if logging_due else {}
        self.apply_gradients(norm)
        state.consumed_samples += config.train.global_batch_size
        self.metrics.add(sums, self.batches.take_counts(), self.timers.backward.take())
        self.checkpoints.poll()
        found = self.validate() if validating else None
        if logging_due:
            self.log(norm, norms, found)
        interval = config.watch.picture_interval
        if self.main and interval and state.step % interval == 0:
            self.draw_samples()
        if saving:
            self.save()
        self.garbage.collect(state.step)
        self.profiler.end_step()

    def forward_backward(self) -> torch.Tensor:
        """The micro-batches of a step: gradients into the buffers, this rank's SUMS."""
        return forward_backward(self.config, self.model, self.batches, self.micro_batches)

    def gradient_norm(self) -> float:
        """The norm of the gradients of this step, all ranks together."""
        with self.profiler.span("gradient norm"):
            return gradient_norm(self.optimizer)

    def apply_gradients(self, norm: float) -> None:
        """Clip and apply the gradients, unless their norm says that they are bad.

        Raises DivergedError, on all ranks, after the save under way is complete.
        """
        state, size = self.state, self.config.train.global_batch_size
        samples = range(state.consumed_samples, state.consumed_samples + size)
        try:
            applied = self.spike_guard.should_apply(state.step, samples, norm)
        except DivergedError as error:
            self.watchdog.begin("the last save")  # the run can go on from what is being saved
            try:
                self.checkpoints.wait()
            except CheckpointError as failure:
                raise error from failure
            raise
        if applied:
            with self.profiler.span("optimizer"):
                update(self.optimizer, norm)

    def validate(self) -> list[dict]:
        """The losses on the validation sources; their time does not count as training's."""
        started, step = time.perf_counter(), self.state.step
        with self.profiler.span("validation"):
            optim.sync_params(self.model)
            found = self.validator.run(
                self.model,
                begin=lambda name: self.watchdog.begin(f"validation on {name} after step {step}"),
            )
        self.watchdog.begin(f"step {step}, after its validation")
        self.metrics.exclude(time.perf_counter() - started)
        return found

    def log(self, norm: float, norms: dict[str, float], validation: list[dict] | None) -> None:
        """Write the row of the interval that ends here."""
        self.metrics.write(
            self.state.step,
            grad_norm=norm,
            grad_norms=norms,
            rates=parameter_groups.learning_rates(self.parameters, self.scheduler, self.config),
            skipped=self.spike_guard.state["skipped"],
            validation=validation,
        )

    def draw_samples(self) -> None:
        """Draw the newest micro-batch as a sheet of samples."""
        batch = self.batches.last
        assert batch is not None, "a step has read micro-batches"
        path = sample_sheet.write(self.output, self.state.step, batch, self.tokenizer)
        self.wandb.log_image("samples", path, self.state.step)

    def report_data(self) -> None:
        """Say what was seen of every source, and what was left out and why."""
        phase = self.state.phases[-1]
        totals = self.metrics.run_totals
        text = write_data_report(self.output, phase.sources, totals, phase.start_sample)
        _logger.info("%s", text)

    def save(self) -> None:
        """Begin a checkpoint of the state after this step."""
        with self.profiler.span("checkpoint"):
            optim.sync_params(self.model)
            self.state.counts = self.metrics.run_totals
            self.state.health = self.spike_guard.state
            self.checkpoints.save(
                self.state.step,
                self.chunks,
                self.config,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                progress=self.state.to_json(),
                tokenizer=self.tokenizer.data,
            )

    def start(self) -> None:
        """Join the process groups; reads the tokenizer, so that a wrong one is refused first."""
        config = self.config
        # A rank that hangs is for the watchdog to show, before those that wait for it give up.
        self.patience = max(30, math.ceil(config.health.step_timeout / 60) + 5)  # minutes
        self.groups = setup.initialize(config.parallel, timeout_minutes=self.patience)
        self.rank = torch.distributed.get_rank()
        self.main = self.rank == 0
        _logger.info("%s", setup.describe_ranks())
        warn_of_slow_settings(config)
        self._closing.enter_context(run_directory(self.output))
        self.tokenizer = load_tokenizer(config.data.tokenizer, config.model.decoder.vocab_size)

    def open_data(self) -> None:
        """The data sets, their phases and the order of rows, and the validation's data sets; epochs
        become `train.steps`."""
        config = self.config
        self.resumed_from = directories.latest(self.output)
        self.data = open_run_data(config, self.tokenizer, self.resumed_from)
        self.validation_data = open_validation(config, self.tokenizer)
        self.state.phases = self.data.phases
        config.train.steps = self.data.steps(config)
        check_steps(config)
        _logger.info("%s", self.data.describe())

    def build_model(self) -> None:
        """The chunks of the model on this rank, frozen and wrapped, optimizer and schedule."""
        config, groups = self.config, self.groups
        loads = bool(self.resumed_from or config.stage.initial_checkpoint)
        torch.manual_seed(config.train.seed + groups.pp.rank())
        self.context = ParallelContext(config, groups, fuses_gradients=True, device=setup.device())
        self._closing.enter_context(user_buffers(config, self.context))
        count = config.parallel.virtual_pipeline
        self.chunks = build(self.context, config.model, count, initialize=not loads)
        self.parameters = parameter_groups.freeze(config, self.chunks)
        self.state.stage_fingerprint = parameter_groups.fingerprint(self.parameters)
        _logger.info("%s", parameter_groups.summary(self.parameters, config))
        if self.resumed_from is None:
            load_initial_weights(config, self.chunks, self.parameters)
        self.model = optim.wrap_ddp(self.chunks, overlap=config.parallel.overlap)
        self.optimizer, self.scheduler = optim.build_optimizer(config, self.model)

    def resume(self) -> None:
        """Weights, optimizer, schedule and state of the latest checkpoint, if there is one."""
        if self.resumed_from is not None and self.data.progress is not None:
            self._load_checkpoint(self.resumed_from, self.data.progress)
        set_back(self.output, self.config, self.state)

    def _load_checkpoint(self, directory: Path, progress: dict) -> None:
        state = self.state
        check_resumed(self.config, self.tokenizer, directory)
        if progress["stage_fingerprint"] != state.stage_fingerprint:
            raise ConfigError(
                "stage.trainable, stage.rates, stage.lora or optimizer.vision_layer_decay is not "
                f"what {directory} was made with; go on with the same, or start another run from "
                "it with stage.initial_checkpoint"
            )
        state.step, state.consumed_samples = progress["step"], progress["slots"]
        state.counts, state.health = progress["counts"], progress["health"]
        if len(state.phases) > len(progress["phases"]):
            state.counts = without_sources(state.counts)
        save_load.load_training(directory, self.chunks, self.optimizer, self.scheduler)
        _logger.info("continuing from %s at step %d", directory, state.step)

    def build_data(self) -> None:
        """Loader and iterator of this rank's micro-batches, and the validation."""
        config, groups = self.config, self.groups
        # Of the ranks that read the same samples, one logs the bad ones.
        first = groups.mp.rank() == 0 and groups.cp.rank() == 0
        per_rank = config.train.global_batch_size // groups.dp.size()
        self.micro_batches = per_rank // config.train.micro_batch_size
        decode_images = self.chunks[0].pre_process
        # Pipeline stages exchange tensors of one shape; asking for it would wait for the device.
        group = self.micro_batches if groups.pp.size() > 1 else 1
        builder = SampleBuilder.of(config, self.tokenizer, decode_images=decode_images)
        self.data.order.row(self.state.consumed_samples)  # planned before the workers are made
        loader = build_loader(
            config.data,
            self.data.datasets,
            self.data.order,
            builder,
            row_alignment=row_alignment(config),
            micro_batch_size=config.train.micro_batch_size,
            start_sample=self.state.consumed_samples,
            data_parallel_rank=groups.dp.rank(),
            data_parallel_size=groups.dp.size(),
            bad_sample_log=bad_samples.path_of(self.output, self.rank) if first else None,
            taken_at_once=group,
        )
        consistency = SampleConsistencyCheck(model_group_on_host(groups, self.patience))
        share = groups.cp.rank(), groups.cp.size()
        self.batches = DataIterator(loader, setup.device(), consistency, share, group)
        self._closing.callback(self.batches.close)
        self.validator = Validator(config, groups, builder, self.validation_data)
        self._closing.callback(self.validator.close)

    def build_observers(self) -> None:
        """Everything that watches the run: watchdog, profiler, metrics, wandb, checkpoints."""
        config, groups, output, state = self.config, self.groups, self.output, self.state
        self.spike_guard = fault_tolerance.GradientSpikeGuard(
            config.health, output, state.health, writes=self.main
        )
        self.watchdog = fault_tolerance.Watchdog(config.health.step_timeout, output, self.rank)
        self._closing.callback(self.watchdog.end)
        # One rank of every pipeline stage shows all there is to see.
        first_of_stage = groups.tp.rank() == groups.cp.rank() == groups.dp.rank() == 0
        self.profiler = Profiler(config.watch, output, records=first_of_stage)
        self._closing.call(lambda failed: self.profiler.close())
        self.timers = self.context.transformer.timers = Timers(self.profiler)
        self.grad_norms = GradNormsByGroup(self.model, self.optimizer, config.model.decoder)
        self.wandb = WandbLogger(config, writes=self.main)
        self._closing.call(lambda failed: self.wandb.close(failed=failed))
        self.metrics = metrics.Metrics(
            config,
            setup.device(),
            self.wandb,
            start_step=state.step,
            run_totals=state.counts,
            sources=state.phases[-1].sources,
            trained={parameter.name for parameter in self.parameters if parameter.trained},
            pipeline_rank=groups.pp.rank(),
        )
        self.checkpoints = CheckpointManager(output, config.train)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close what was built, on every path; the process groups only where all ranks do, for a
        rank that failed would wait in them for the others."""
        self._closing.__exit__(kind, error, traceback)
        if error is None:
            setup.shutdown()
