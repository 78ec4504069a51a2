"""Images in a row, of which one that is packed has several."""

from megatron_owl2.config.schema import RunConfig

# Positions of packed rows to each image, of text and of vision, in the paper's instruction mixture
# (tools/bench/packing.py).
POSITIONS_PER_IMAGE = 725


def most_images(config: RunConfig) -> int:
    """Images that a row may have, which memory must allow for."""
    if not config.data.packing:
        return 1
    fitting = config.data.sequence_length // config.model.tokens_per_image
    return min(config.data.images_per_row, fitting)


def mean_images(config: RunConfig) -> int:
    """Images that a row has on average, which decide the time; rounded, and at least one."""
    length = config.data.sequence_length
    return min(most_images(config), max(1, round(length / POSITIONS_PER_IMAGE)))
