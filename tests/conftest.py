"""Nothing of one test file reaches the next that runs in the same process."""

import contextlib
import gc
import os
import signal
import sys
from pathlib import Path

import pytest

from megatron_owl2.mcore.setup import on_cpu, setup

if on_cpu():  # Triton reads it when it is imported, which megatron.core may do
    os.environ["TRITON_INTERPRET"] = "1"
setup()

# Tests that start themselves in ranks of torchrun find what lies in helpers/, too.
_HELPERS = str(Path(__file__).parent / "helpers")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_HELPERS, os.environ.get("PYTHONPATH")]))

with contextlib.suppress(ImportError):  # tests/gpu does without, where nothing can be installed
    from hypothesis import settings

    settings.register_profile("any machine", deadline=None)  # a busy one stands still now and then
    settings.load_profile("any machine")

# A shell that runs the tests in the background has SIGINT and SIGQUIT ignored, and children would
# inherit that; what tests send to processes must arrive.
for _kind in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(_kind) is signal.SIG_IGN:
        _interrupt = _kind == signal.SIGINT
        signal.signal(_kind, signal.default_int_handler if _interrupt else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that wait or take long begin first, so that no worker is left with one at the end."""
    marks = ("slurm", "distributed", "slow")
    items.sort(key=lambda item: [item.get_closest_marker(mark) is None for mark in marks])


@pytest.fixture(scope="module", autouse=True)
def leaves_no_process_groups():
    """A file may leave its groups open; later ones plan, fork or join groups of their own."""
    yield
    if setup := sys.modules.get("megatron_owl2.mcore.setup"):
        setup.shutdown()
    gc.collect()  # a group that is garbage crashes a forked child whose collector frees it


@pytest.fixture(scope="module", autouse=True)
def leaves_no_environment():
    """Tools that run in this process, and libraries that they import, set variables."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def leaves_no_signal_handlers():
    """Tools that run in this process set their own, torch's data loader one for its workers."""
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1)
    before = {kind: signal.getsignal(kind) for kind in kinds}
    yield
    for kind, handler in before.items():
        if handler is not None:  # set outside of Python
            signal.signal(kind, handler)
