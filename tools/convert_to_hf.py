"""Script of a checkout for `owl2 convert-to-hf`, megatron_owl2/cli/convert_to_hf.py."""

import sys

from megatron_owl2.cli.convert_to_hf import main

if __name__ == "__main__":
    sys.exit(main())
