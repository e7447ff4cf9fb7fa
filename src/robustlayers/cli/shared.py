"""A command in several processes that `torchrun` started: they meet, work, and end together, also when one fails."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable

from robustlayers.core.device import pick_device
from robustlayers.core.errors import UserError, system_text
from robustlayers.core.ranks import Ranks, joined
from robustlayers.study.together import Ended

__all__ = ["together"]


def together(device: str, work: Callable[[Ranks, str], int]) -> int:
    """Do `work(ranks, this process's device)` in all processes and end each with what the main one's returned.

    If one fails, it says so in one line and ends, and `torchrun` ends the others: they may be waiting for it in the middle
    of an exchange, which no exception reaches. For the same reason signals end a process at once; the store can bear that.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    where = pick_device(device)
    with joined(where) as ranks:
        try:
            code = int(ranks.tell(work(ranks, str(where))))
            ranks.wait()
        except Exception as error:
            # The first one knows the cause; the others have lost the connection to it, or found the same.
            code = _tell(error, ranks) if ranks.first() or not str(error) else 1
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: after a failure, exchanges will never end; after success, gloo's threads abort a process that is still
        # closing its connections when another one has gone.
        os._exit(code)


def _tell(error: Exception, ranks: Ranks) -> int:
    if isinstance(error, UserError):
        for fault in error.faults:
            print(fault, file=sys.stderr)
        return 2
    if isinstance(error, Ended):
        if str(error):
            print(f"failed: {error}", file=sys.stderr)
        return 1
    if isinstance(error, OSError) and (text := system_text(error)):
        print(text, file=sys.stderr)
        return 1
    traceback.print_exception(error)
    print(f"failed: {type(error).__name__}: {error} (process {ranks.index} of {ranks.count})", file=sys.stderr)
    return 1
