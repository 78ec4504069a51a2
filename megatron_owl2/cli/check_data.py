"""Check of a data set: manifest, sizes, indexes, checksums of every sample.

    owl2 check-data DIR [--decode FRACTION] [--workers N]

DIR is a folder or a URL. Prints what is wrong and the counts; exits 0 if all is right, 1 if
anything is wrong and 2 if DIR is no data set.
"""

import argparse

from megatron_owl2.cli.command import Command
from megatron_owl2.cli.options import fraction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="data set: a folder or a URL")
    parser.add_argument(
        "--decode", type=fraction, default=0.0, metavar="FRACTION", help="of images to decode"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--cache", default="", metavar="DIR", help="local folder, for a URL")
    parser.add_argument(
        "--show", type=int, default=20, metavar="N", help="bad samples to print; the rest count"
    )


def run(options: argparse.Namespace) -> int:
    """Returns 0 for a sound data set, 1 for a damaged one."""
    from data_prep.check import check, unlisted
    from megatron_owl2.data.storage import StorageOptions

    storage = StorageOptions(cache=options.cache)
    shards = samples = good = decoded = bad = unreadable = faults = shown = 0
    for result in check(options.directory, options.decode, options.workers, storage):
        shards += 1
        samples += result.good + len(result.bad) + result.unreadable
        good, decoded = good + result.good, decoded + result.decoded
        bad, unreadable = bad + len(result.bad), unreadable + result.unreadable
        faults += len(result.faults)
        for fault in result.faults:
            print(f"shard: {fault}")
        for reason in result.bad[: max(0, options.show - shown)]:
            print(f"sample: {reason}")
        shown += len(result.bad)
    if shown > options.show:
        print(f"... and {shown - options.show} more bad samples (--show {shown} prints all)")
    extra = unlisted(options.directory)
    for name in extra:
        print(f"shard: {name} is not in the manifest, so it is never read")
    print(
        f"{options.directory}: {samples:,} samples in {shards:,} shards: {good:,} good "
        f"({decoded:,} images decoded), {bad:,} bad, {unreadable:,} unreadable; "
        f"{faults + len(extra)} faults of shards"
    )
    wrong = bad or unreadable or faults or extra
    print("DAMAGED" if wrong else "ok")
    return 1 if wrong else 0


main = Command(verb="check-data", help=__doc__, add_arguments=add_arguments, run=run).main
