"""Script of a checkout for `owl2 index-data`, megatron_owl2/cli/index_data.py."""

import sys

from megatron_owl2.cli.index_data import main

if __name__ == "__main__":
    sys.exit(main())
