"""Draw the curves of training runs from their metrics.jsonl, a column for every run:

python tools/plot_run.py RUN_DIR [RUN_DIR ...] --output curves.png
"""

import argparse
import sys
from pathlib import Path

from megatron_owl2.errors import ReportError
from megatron_owl2.plotting import curves


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", required=True, type=Path, help="the PNG to write")
    options = parser.parse_args()
    try:
        curves.draw(options.output, options.runs)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
