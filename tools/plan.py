"""Script of a checkout for `owl2 plan`, megatron_owl2/cli/plan.py."""

import sys

from megatron_owl2.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
