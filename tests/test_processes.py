"""What the tests start does not outlive them."""

import subprocess

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
