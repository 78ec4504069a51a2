"""Packed rows against the same samples in rows of their own: losses and all gradients."""

import dialogues
import pytest
import tiny_run
import torch
from tiny_data import one_per_row

from megatron_owl2.config.load import load_config
from megatron_owl2.data.batch import Batch, collate
from megatron_owl2.data.conversation import Sample
from megatron_owl2.data.sample_builder import SampleBuilder
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.packed_sequences import PackedSequences
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.attention import attend, attend_packed
from megatron_owl2.model.owl2 import Owl2

LENGTH = 160


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_config(
        tiny_run.make(tmp_path_factory.mktemp("packed")), ["data.sequence_length=64"]
    )


@pytest.fixture(scope="module")
def samples(config) -> list[Sample]:
    builder = SampleBuilder.of(config, Tokenizer(config.data.tokenizer))
    found = [
        builder.build(dialogues.dialogue(index), {"decode_seconds": 0.0}) for index in range(9)
    ]
    assert {sample.image_count for sample in found} == {0, 1, 2}
    return found


@pytest.fixture(scope="module")
def model(config):
    setup.setup()
    torch.manual_seed(0)
    yield Owl2(ParallelContext(config, setup.initialize(config.parallel)), config.model)
    setup.shutdown()


def packed(rows: list[list[Sample]], row_alignment: int = 16) -> Batch:
    return collate(
        rows,
        row_indices=range(len(rows)),
        image_size=28,
        row_alignment=row_alignment,
        sequence_length=LENGTH,
        packed=True,
    )


def loss_and_gradients(model: Owl2, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = model(
        batch.tokens,
        batch.image,
        batch.vision_token_index,
        batch.modality,
        batch.position_ids,
        batch.labels,
        batch.target_index,
        packed=batch.packed,
    )
    mask = batch.loss_mask.t().flatten().index_select(0, batch.target_index)
    loss = (losses * mask).sum() / mask.sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "places",
    [
        [[0, 1], [2], [3, 4, 5], [6], [7, 8]],  # rows of one sample, too
        [[8, 7], [6, 0], [5], [1, 2], [4, 3], []],  # in any order, and an empty row
    ],
)
def test_packed_rows_have_the_loss_and_the_gradients_of_single_ones(model, samples, places):
    alone, expected = loss_and_gradients(model, one_per_row(samples, 28, LENGTH))
    batch = packed([[samples[index] for index in row] for row in places])
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == pytest.approx(float(alone), rel=1e-5)
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        apart = float((gradients[name] - gradient).norm())
        assert apart <= 1e-4 * max(float(gradient.norm()), 1e-3 * scale), name


def test_a_sample_does_not_see_its_neighbours(model, samples):
    """Logits of the second of three samples, whatever stands around it."""

    def logits(before: int, after: int) -> torch.Tensor:
        row = [samples[before], samples[3], samples[after]]
        batch = packed([row], row_alignment=LENGTH)
        start = samples[before].length
        with torch.no_grad():
            whole = model(
                batch.tokens,
                batch.image,
                batch.vision_token_index,
                batch.modality,
                batch.position_ids,
                packed=batch.packed,
            )
        return whole[0, start : start + samples[3].length]

    torch.testing.assert_close(logits(0, 1), logits(1, 0), atol=1e-5, rtol=1e-5)


def test_padding_of_packed_rows_changes_nothing(model, samples):
    batch = packed([samples[:2], samples[2:3]])
    longer = batch.padded_to(batch.length + 16)
    assert [sum(row) for row in longer.packed.lengths] == [batch.length + 16] * 2
    loss, gradients = loss_and_gradients(model, batch)
    padded, others = loss_and_gradients(model, longer)
    assert padded == pytest.approx(float(loss), rel=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], atol=1e-6), name


def test_offsets_and_numbers():
    found = PackedSequences.of([[3, 2], [], [4, 4]], 8)
    assert found.lengths == ((3, 2, 3), (8,), (4, 4)) and found.max_length == 8
    assert found.cu_seqlens.tolist() == [0, 3, 5, 8, 16, 20, 24]
    assert found.cu_seqlens.dtype == torch.int32
    assert found.numbers(torch.device("cpu")).tolist() == [
        [0, 0, 0, 1, 1, 2, 2, 2],
        [0] * 8,
        [0] * 4 + [1] * 4,
    ]
    parameters = found.parameters()
    assert parameters.qkv_format == "thd" and parameters.max_seqlen_q == 8
    assert parameters.cu_seqlens_q is parameters.cu_seqlens_kv is found.cu_seqlens


def test_block_attention_is_that_of_a_mask():
    torch.manual_seed(0)
    query, key, value = torch.randn(8, 3, 4, 8), torch.randn(8, 3, 2, 8), torch.randn(8, 3, 2, 8)
    sequences = PackedSequences.of([[3, 2], [], [4, 4]], 8)
    numbers = sequences.numbers(query.device)
    allowed = (numbers.unsqueeze(2) == numbers.unsqueeze(1)).tril().unsqueeze(1)
    expected = attend(query, key, value, mask=allowed)
    torch.testing.assert_close(attend_packed(query, key, value, sequences), expected)
