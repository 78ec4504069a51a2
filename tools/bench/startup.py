"""Cost of building a model whose weights come from a checkpoint, with and without initial values.

    python tools/bench/startup.py --layers 8

Each way is a process of its own: seconds of a processor, and how far its memory grew. The model is
that of the 7B recipe with fewer layers and a narrower decoder.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.mcore import setup


def measure(layers: int, hidden_size: int, initialize: bool) -> dict[str, float]:
    """Seconds of a processor, MiB of main memory and parameters of a model that is built here."""
    groups = setup.initialize((config := RunConfig()).parallel)
    from megatron_owl2.mcore.parallel import ParallelContext
    from megatron_owl2.model.owl2 import build

    decoder = config.model.decoder
    decoder.num_layers, decoder.hidden_size, decoder.ffn_size = layers, hidden_size, hidden_size * 3
    decoder.num_heads = decoder.num_kv_heads = hidden_size // 128
    config.train.precision = "bf16"
    context = ParallelContext(config, groups, device=setup.device())
    before, started = _peak(), time.process_time()
    (model,) = build(context, config.model, initialize=initialize)
    seconds = time.process_time() - started
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return {"seconds": seconds, "mib": _peak() - before, "parameters": numbers}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--measure", choices=("drawn", "empty"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.layers, given.hidden_size, given.measure == "drawn")))
        return
    found = {}
    for way in ("drawn", "empty"):
        command = [sys.executable, *sys.argv, f"--measure={way}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{way}: {row['seconds']:.2f} s, {row['mib']:,.0f} MiB for "
            f"{row['parameters'] / 1e6:,.0f} M parameters in bf16"
        )
    ratio = found["drawn"]["seconds"] / found["empty"]["seconds"]
    print(f"without initial values {ratio:,.0f} x faster")


if __name__ == "__main__":
    main()
