"""Script of a checkout for `owl2 visualize-attention`, megatron_owl2/cli/visualize_attention.py."""

import sys

from megatron_owl2.cli.visualize_attention import main

if __name__ == "__main__":
    sys.exit(main())
