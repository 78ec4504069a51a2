"""owl2 evaluate, killed (SIGKILL) at the n-th time that it waits for the disk.

python killed_evaluation.py N TORN RANK ARGUMENTS...: with TORN 1 the last bytes of what it wrote
are taken off first, as when a line is written in part. Only the process of this RANK is killed.
"""

import os
import signal
import sys

from megatron_owl2.cli.evaluate import main


def kill_at(wanted: int, torn: bool) -> None:
    sync, count = os.fsync, 0

    def counted(descriptor: int) -> None:
        nonlocal count
        sync(descriptor)
        count += 1
        if count == wanted:
            if torn:
                os.truncate(descriptor, os.fstat(descriptor).st_size - 9)
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = counted


if __name__ == "__main__":
    wanted, torn, rank = map(int, sys.argv[1:4])
    if os.environ.get("RANK", "0") == str(rank):
        kill_at(wanted, bool(torn))
    sys.exit(main(sys.argv[4:]))
