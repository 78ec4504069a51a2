"""What every test file begins with."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def nothing_left_to_collect():
    """Process groups that the file before left to the collector would crash forked children."""
    gc.collect()
