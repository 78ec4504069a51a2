"""Index and manifest for the tar files of another program, where they lie.

    owl2 index-data DIR [--workers N]

DIR holds shards as webdataset.ShardWriter or img2dataset write them (an image with .txt or .json)
or our own without their manifest. Every file is read once and gets an index and checksums beside
it; the manifest is written if all are sound. Samples that training cannot use stay and are counted;
files that are no shards are named. What must be filtered, unpacked, or rescued from damaged files,
goes through tools/preprocess_data.py instead. Exits 1 if a file is damaged or compressed.
"""

import argparse
import sys
from pathlib import Path

from megatron_owl2.cli.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes")


def run(options: argparse.Namespace) -> int:
    """Returns 0, or 1 if a file is damaged."""
    from data_prep.corpus_files import count_unread, describe_unread
    from data_prep.index import index_directory

    found = index_directory(options.directory, options.workers)
    for failure in found.failures:
        print(f"cannot be indexed: {failure}", file=sys.stderr)
    samples = sum(row["samples"] for row in found.rows)
    print(f"{options.directory}: {samples:,} samples in {len(found.rows):,} sound shards")
    if found.unusable:
        print(
            f"{found.unusable.total():,} of them cannot be used: training takes others in their "
            "place, tools/check_data.py names them; tools/preprocess_data.py --format webdataset "
            "leaves them out, and puts together files that lie apart"
        )
        for reason, count in found.unusable.most_common():
            print(f"  {count:,} x {reason}")
    if found.rows:
        print("images were not decoded: tools/check_data.py --decode 1 does that")
    for line in describe_unread(count_unread(found.unread)):
        print(line)
    if found.failures:
        print(
            f"{len(found.failures)} shards cannot be indexed, so there is no manifest: remove "
            "them, or keep what is whole with tools/preprocess_data.py --format webdataset",
            file=sys.stderr,
        )
        return 1
    return 0


main = Command(
    verb="index-data",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    interrupted="interrupted; start again to index the folder",
).main
