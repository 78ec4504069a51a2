"""Script of a checkout for `owl2 measure-lengths`, megatron_owl2/cli/measure_lengths.py."""

import sys

from megatron_owl2.cli.measure_lengths import main

if __name__ == "__main__":
    sys.exit(main())
