"""Script of a checkout for `owl2 evaluate`, megatron_owl2/cli/evaluate.py."""

import sys

from megatron_owl2.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
