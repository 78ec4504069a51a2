"""Script of a checkout for `owl2 prepare-downloads`, megatron_owl2/cli/prepare_downloads.py."""

import sys

from megatron_owl2.cli.prepare_downloads import main

if __name__ == "__main__":
    sys.exit(main())
