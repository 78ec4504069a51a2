"""What the tests start does not outlive them."""

import signal
import subprocess
import sys
from functools import partial

import psutil
import pytest
from processes import run_ranks, wait_until


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
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == -signal.SIGINT


def test_tests_started_in_the_background_send_their_signals():
    test = f"{__file__}::{test_what_the_tests_start_can_be_interrupted.__name__}"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", test]
    ignored = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    done = subprocess.run(command, preexec_fn=ignored, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
