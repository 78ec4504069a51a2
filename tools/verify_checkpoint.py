"""Script of a checkout for `owl2 verify-checkpoint`, megatron_owl2/cli/verify_checkpoint.py."""

import sys

from megatron_owl2.cli.verify_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
