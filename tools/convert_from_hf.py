"""Script of a checkout for `owl2 convert-from-hf`, megatron_owl2/cli/convert_from_hf.py."""

import sys

from megatron_owl2.cli.convert_from_hf import main

if __name__ == "__main__":
    sys.exit(main())
