"""Script of a checkout for `owl2 build-mixture`, megatron_owl2/cli/build_mixture.py."""

import sys

from megatron_owl2.cli.build_mixture import main

if __name__ == "__main__":
    sys.exit(main())
