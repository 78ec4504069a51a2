"""Weights that a run starts from."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.training.checkpoint import save_load
from megatron_owl2.training.model_settings import check_initial
from megatron_owl2.training.parameter_groups import Parameter

_logger = logging.getLogger(__name__)


def load_initial_weights(
    config: RunConfig, chunks: Sequence[Owl2], parameters: Sequence[Parameter]
) -> None:
    """Load `stage.initial_checkpoint` into this rank's chunks, at another image size too.

    Without one the weights stay random, with a warning if some of them do not train. Raises
    CheckpointError as load_weights does, and ConfigError for the weights of another model.
    """
    initial = config.stage.initial_checkpoint
    if initial is not None:
        check_initial(config, Path(initial))
        save_load.load_weights(Path(initial), chunks, any_resolution=True)
        _logger.info("weights from %s", initial)
        return
    frozen = sum(parameter.numel for parameter in parameters if not parameter.trained)
    if frozen and torch.distributed.get_rank() == 0:
        _logger.warning(
            "%s parameters that this stage does not train stay random, for "
            "stage.initial_checkpoint is not set",
            f"{frozen:,}",
        )
