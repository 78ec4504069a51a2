"""Processes that the tests start: they end with the tests, and signals reach them."""

import signal
import subprocess
import sys

import psutil
import pytest
from processes import killed_by_errors, run_ranks, wait_until

pytestmark = pytest.mark.distributed


def test_a_job_that_runs_out_of_time_takes_its_ranks_along(tmp_path):
    script = tmp_path / "sleep.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], str(os.getpid())).touch()\n"
        "time.sleep(1000)\n"
    )
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    with pytest.raises(subprocess.TimeoutExpired):
        run_ranks(2, script, ranks, timeout=15)
    started = [int(path.name) for path in ranks.iterdir()]
    assert len(started) == 2
    wait_until(lambda: not any(psutil.pid_exists(rank) for rank in started))


def test_what_the_tests_start_can_be_interrupted():
    """Also where a shell has started the tests in its background: with SIGINT ignored."""
    child = subprocess.Popen(["sleep", "1000"])  # python takes one during its start for a failure
    with killed_by_errors(child):
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == -signal.SIGINT


def test_tests_started_in_the_background_send_their_signals():
    test = f"{__file__}::{test_what_the_tests_start_can_be_interrupted.__name__}"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", test]
    background = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command]
    done = subprocess.run(background, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
