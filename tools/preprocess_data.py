"""Script of a checkout for `owl2 preprocess-data`, megatron_owl2/cli/preprocess_data.py."""

import sys

from megatron_owl2.cli.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main())
