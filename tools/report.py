"""Script of a checkout for `owl2 report`, megatron_owl2/cli/report.py."""

import sys

from megatron_owl2.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
