"""Script of a checkout for `owl2 serve`, megatron_owl2/cli/serve.py."""

import sys

from megatron_owl2.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
