"""Script of a checkout for `owl2 generate`, megatron_owl2/cli/generate.py."""

import sys

from megatron_owl2.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
