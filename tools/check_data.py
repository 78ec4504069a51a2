"""Script of a checkout for `owl2 check-data`, megatron_owl2/cli/check_data.py."""

import sys

from megatron_owl2.cli.check_data import main

if __name__ == "__main__":
    sys.exit(main())
