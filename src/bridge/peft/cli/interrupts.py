"""Ctrl-C while modules are imported: leave at once, for a half-imported one fails anyhow."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def quit_on_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C ends the process with exit code 130; for when there is nothing to keep."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else decides what an interrupt does
        return
    signal.signal(signal.SIGINT, _quit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _quit(number: int, frame: FrameType | None) -> None:
    sys.stdout.flush()
    print("error: interrupted", file=sys.stderr, flush=True)
    os._exit(128 + number)
