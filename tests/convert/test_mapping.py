"""The table of names: one rule for every weight, and transforms that undo each other."""

import pytest
import torch
from hf_dirs import OWL2, tensors_of

from megatron_owl2.convert.mapping import rules
from megatron_owl2.convert.sources import from_released
from megatron_owl2.convert.transforms import Interleave, LeadingOnes, PadRows
from megatron_owl2.model.layer_stack import weights


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (Interleave(2, (3, 1, 1)), [(12, 5), (4, 5), (4, 5)]),
        (Interleave(1, (1, 1)), [(6, 2), (6, 2)]),
        (Interleave(3, (1, 1, 1)), [(6,), (6,), (6,)]),
        (LeadingOnes(2), [(7,)]),
        (PadRows(3), [(5, 2)]),
    ],
)
def test_split_undoes_join(transform, shapes):
    parts = [torch.randn(shape) for shape in shapes]
    for part, again in zip(parts, transform.split(transform.join(parts)), strict=True):
        assert torch.equal(part, again)


def test_query_rows_stand_before_the_key_and_value_they_share():
    query, key, value = torch.arange(8), torch.arange(10, 14), torch.arange(20, 24)
    joined = Interleave(2, (2, 1, 1)).join([query, key, value])  # 4 heads of 2, 2 groups
    assert joined.tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]


def test_every_parameter_and_every_tensor_has_one_rule():
    model = from_released(OWL2).build()
    table = rules("owl2", model.model)
    assert sorted(rule.ours for rule in table) == sorted(weights(model))
    tables = {rule.ours for rule in table if rule.constant}
    assert weights(model).keys() - tables == {name for name, _ in model.named_parameters()}
    theirs = [name for rule in table for name in rule.theirs]
    stored = {n for n in tensors_of(OWL2) if not n.endswith("inv_freq")}
    assert sorted(theirs) == sorted(stored)
