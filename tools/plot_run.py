"""Script of a checkout for `owl2 plot-run`, megatron_owl2/cli/plot_run.py."""

import sys

from megatron_owl2.cli.plot_run import main

if __name__ == "__main__":
    sys.exit(main())
