"""Make the tar files of another program a data set where they lie, without copying them.

    python tools/index_data.py DIR [--workers N]

DIR holds shards as webdataset.ShardWriter or img2dataset write them (an image with .txt or .json)
or our own without their manifest. Every file is read once and gets an index and checksums beside
it; the manifest is written if all are sound. Samples that lack a part stay and are counted. What
must be filtered, or rescued from damaged files, goes through tools/preprocess_data.py instead.
Exits 1 if a file is damaged.
"""

import argparse
import sys
from pathlib import Path

from data_prep.index import index_directory
from megatron_owl2.errors import ShardError


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    options = parser.parse_args(arguments)
    try:
        found = index_directory(options.directory, options.workers)
    except (OSError, ShardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; start again to index the folder", file=sys.stderr)
        return 130
    for failure in found.failures:
        print(f"damaged: {failure}", file=sys.stderr)
    samples = sum(row["samples"] for row in found.rows)
    print(f"{options.directory}: {samples:,} samples in {len(found.rows):,} sound shards")
    if found.unusable:
        print(
            f"{found.unusable.total():,} of them cannot be used: training takes others in their "
            "place, tools/check_data.py names them"
        )
        for reason, count in found.unusable.most_common():
            print(f"  {count:,} x {reason}")
    if found.failures:
        print(
            f"{len(found.failures)} damaged shards, so there is no manifest: remove them, or keep "
            "what is whole with tools/preprocess_data.py --format webdataset",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
