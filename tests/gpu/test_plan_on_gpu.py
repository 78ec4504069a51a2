"""The planned memory against what a GPU allocates: this is what verifies the estimate."""

import pytest
import torch

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import build
from megatron_owl2.planner import activations
from megatron_owl2.planner import static_memory as weights
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training import parameter_groups

pytestmark = pytest.mark.gpu

STAGE_1 = ["vision_model.*", "abstractor.*", "*.linear_kv_vision.weight", "*.weight_vision"]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("trainable", [["*"], STAGE_1])
def test_a_step_needs_the_memory_that_is_planned(trainable, recompute):
    run = RunConfig()
    run.stage.trainable, run.parallel.recompute = list(trainable), recompute
    run.model.decoder.num_layers, run.model.vision.num_layers = 4, 6  # of the 7B model's widths
    run.train.micro_batch_size, run.data.sequence_length = 4, 512
    whole = weights.model_weights(run)
    (held,) = weights.static_memory(run, 1, whole)
    cost = activations.ActivationCosts(whole)(run, 0)

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    context = ParallelContext(run, setup.initialize(run.parallel), fuses_gradients=True)
    chunks = [chunk.to(setup.device()) for chunk in build(context, run.model, 1)]
    parameter_groups.freeze(run, chunks)
    (model,) = optim.wrap_ddp(chunks, overlap=run.parallel.overlap)
    resting = torch.cuda.memory_allocated() - before
    assert resting == pytest.approx(held.parameters + held.gradients, rel=0.01)

    for _ in range(2):  # libraries take their workspaces at first use
        torch.cuda.reset_peak_memory_stats()
        started = torch.cuda.memory_allocated()
        batch = [t.to(setup.device()) for t in activations.example_batch(run, 4)]
        output = model(*batch)
        kept = torch.cuda.memory_allocated() - started
        torch.autograd.backward(output, torch.ones_like(output))
        most = torch.cuda.max_memory_allocated() - started
        model.finish_grad_sync()  # as every step does; megatron-core starts no second reduction
        model.zero_grad_buffer()
        del output, batch
    assert cost.kept == pytest.approx(kept, rel=0.1)
    assert cost.kept + cost.working == pytest.approx(most, rel=0.1)
