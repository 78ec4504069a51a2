"""`python -m megatron_owl2.cli VERB`: the console command `owl2`, also for torchrun."""

import sys

from megatron_owl2.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
