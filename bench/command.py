"""How a benchmark's command ends: errors that a user can act on are one line on stderr."""

import sys
from collections.abc import Callable

from headstart.bench.http_client import BenchError

EXPECTED = (BenchError, ValueError, OSError)


def exit_status(work: Callable[[], int], expected: tuple[type[Exception], ...] = EXPECTED) -> int:
    """0; 1 if ``work`` counted failures or raised what is ``expected``; 130 after Ctrl-C."""
    try:
        failed = work()
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 1 if failed else 0
