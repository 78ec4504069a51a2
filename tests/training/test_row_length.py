"""Rows as long as they must be: losses and gradients are those of rows padded to the end."""

import itertools

import pytest
import tiny_run
import torch
from small_configs import run_config
from streams import assert_equal

from megatron_owl2.config.load import load_config
from megatron_owl2.config.schema import KernelConfig
from megatron_owl2.config.validate_parallel import validate_parallel
from megatron_owl2.data.batch import Batch, equally_long
from megatron_owl2.data.image_tokens import target_index
from megatron_owl2.data.row_length import padded_length, row_alignment
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import build
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training import parameter_groups
from megatron_owl2.training.step import evaluate, forward_backward


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_config(tiny_run.make(tmp_path_factory.mktemp("rows")))


@pytest.fixture(scope="module")
def batches(config):
    """The same micro-batches, cut and padded to data.sequence_length; one has no image."""
    sizes = [1] * 4 + [2] * 4
    cut, full = (
        [
            next(tiny_run.batches(config, rows, start_sample=2 * number, **options))
            for number, rows in enumerate(sizes)
        ]
        for options in ({}, {"row_alignment": 48})
    )
    assert {bool(batch.modality.any()) for batch in cut} == {True, False}
    return cut, full


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(0)
    context = ParallelContext(config, setup.initialize(config.parallel))
    chunks = build(context, config.model, 1)
    parameter_groups.freeze(config, chunks)
    yield optim.wrap_ddp(chunks, overlap=True)
    setup.shutdown()


def gradients(config, model, batches: list[Batch]) -> tuple[torch.Tensor, dict]:
    """SUMS and the gradients of the mean loss."""
    model[0].zero_grad_buffer()
    sums = forward_backward(config, model, iter(batches), len(batches))
    named = model[0].module.named_parameters()
    return sums, {name: parameter.main_grad.clone() for name, parameter in named}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    scale = max(float(gradient.norm()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        error = float((found[1][name] - gradient).norm())
        assert error <= 1e-5 * float(gradient.norm()) + 1e-7 * scale, name


def test_a_micro_batch_is_as_long_as_its_longest_row(batches):
    cut, full = batches
    for ours, whole in zip(cut, full, strict=True):
        assert whole.length == 48 and ours.length == -(-int(whole.lengths.max()) // 16) * 16
        assert_equal(ours.padded_to(48), whole)
    assert len({batch.length for batch in cut}) > 1
    assert {batch.length for batch in equally_long(cut)} == {max(batch.length for batch in cut)}


def test_losses_and_gradients_do_not_depend_on_padding(config, model, batches):
    cut, full = batches
    assert_same(gradients(config, model, cut), gradients(config, model, full))
    sums = [evaluate(config, model, iter(each), len(each)) for each in batches]
    torch.testing.assert_close(*sums, rtol=1e-6, atol=0)


def test_the_loss_is_that_of_all_logits(config, model, batches):
    """Per target, from the logits of every row and torch's own cross entropy."""
    for batch in batches[0]:
        given = batch.tokens, batch.image, batch.vision_token_index, batch.modality
        with torch.no_grad():
            logits = model[0](*given, batch.position_ids)
            losses = model[0](*given, batch.position_ids, batch.labels, batch.target_index)
        options = {"ignore_index": -100, "reduction": "none"}
        whole = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2).double(), batch.labels, **options
        )
        expected = whole.t().flatten()[batch.target_index]
        assert len(losses) == int(batch.loss_mask.sum()) < batch.tokens.numel()
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_micro_batch_without_target_takes_part_and_changes_nothing(config, model, batches):
    batch = batches[0][0]
    ignored = torch.full_like(batch.labels, -100)
    silent = Batch(
        **vars(batch)
        | {
            "labels": ignored,
            "loss_mask": torch.zeros_like(batch.loss_mask),
            "target_index": target_index(ignored),
        }
    )
    assert silent.target_index.tolist() == [0]
    expected = gradients(config, model, batches[0])
    # The reduction of gradients, which overlaps the last one, asks for every parameter.
    assert_same(gradients(config, model, [silent, *batches[0], silent]), expected)
    sums, found = gradients(config, model, [silent])
    assert not sums.any() and not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_share_the_targets(batches, size):
    for batch in batches[0]:
        if batch.length % (2 * size):
            continue
        labels: list[int] = []
        for rank in range(size):
            share = batch.local_to(rank, size)
            assert share.labels.shape == (len(batch.tokens), batch.length // size)
            own = share.labels.t().flatten()[share.target_index].tolist()
            labels += [label for label in own if label != -100]
        expected = batch.labels[batch.labels != -100].tolist()
        assert sorted(labels) == sorted(expected)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("fp8", ["none", "tensorwise", "blockwise", "mxfp8"])
def test_every_length_is_one_that_the_run_can_compute(rows, fp8):
    for tp, cp in itertools.product((1, 2, 4, 8), (1, 2, 3)):
        length = 8192 * cp
        config = run_config(tensor=tp, context=cp, sequence=tp > 1, length=length, rows=rows)
        config.model.decoder.ffn_size = config.model.abstractor.ffn_size = 8 * 128
        config.model.decoder.num_heads = config.model.decoder.num_kv_heads = 8
        config.model.vision.num_heads = config.model.abstractor.num_heads = 8
        config.model.decoder.hidden_size = 8 * 128
        config.train.global_batch_size = rows
        if fp8 != "none":
            config.kernels = KernelConfig("transformer_engine", fp8)
        validate_parallel(config, tp * cp)
        alignment = row_alignment(config)
        assert alignment % 16 == 0 and (alignment == 16 or tp * cp > 1 or fp8 != "none")
        for longest in (1, alignment, alignment + 1, length - 1):
            cut = padded_length(longest, alignment, length)
            assert longest <= cut < longest + alignment
            config.data.sequence_length = cut
            validate_parallel(config, tp * cp)
        config.data.sequence_length = length


def test_no_length_is_above_the_one_of_the_run():
    config = run_config(length=72)
    assert row_alignment(config) == 16
    assert [padded_length(n, 16, 72) for n in (3, 64, 65, 72)] == [16, 64, 72, 72]
    config.parallel.tensor_overlap = True  # a run of one shape
    assert padded_length(3, row_alignment(config), 72) == 72


def test_workers_have_the_micro_batches_of_a_step_ready(config):
    config.data.workers, config.data.prefetch = 2, 3
    loader = tiny_run.loader(config, 1, taken_at_once=9)
    assert loader._prefetch == 5
    assert tiny_run.loader(config, 1, taken_at_once=4)._prefetch == 3
