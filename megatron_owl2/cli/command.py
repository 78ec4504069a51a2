"""How a conversion tool ends: one line that says what was wrong, and an exit status."""

import signal
import sys
from collections.abc import Callable

from megatron_owl2.errors import CheckpointError, ConfigError, ConversionError


def run(work: Callable[[], None]) -> int:
    """0 after `work`, 2 after an error that its user can mend, 130 when it is interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work()
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ConversionError, ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
