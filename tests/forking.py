"""What is asked in a forked process, for tests of what such a process inherits."""

import os
import signal
import time

import pytest

# Windows starts processes anew: nothing is inherited there that could be held by a thread.
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes")
SECONDS = 60
RAISED = 255


def in_fork(ask) -> int:
    """What `ask` has returned there as a number, `RAISED` where it has raised, -9 where it has hung."""
    child = os.fork()
    if child == 0:
        status = RAISED
        try:
            status = int(ask() or 0)
        finally:
            os._exit(status)
    end = time.monotonic() + SECONDS
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])
