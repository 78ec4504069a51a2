"""Script of a checkout for `owl2 show-sample`, megatron_owl2/cli/show_sample.py."""

import sys

from megatron_owl2.cli.show_sample import main

if __name__ == "__main__":
    sys.exit(main())
