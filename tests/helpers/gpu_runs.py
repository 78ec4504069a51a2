"""Training runs for tests on a GPU."""

import tiny_run

FP32 = ["train.precision=fp32"]


def train(config, output, *overrides, cpu=False, processes=1):
    environment = {"CUDA_VISIBLE_DEVICES": ""} if cpu else None
    done = tiny_run.train(config, output, *overrides, processes=processes, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return tiny_run.figures(output)
