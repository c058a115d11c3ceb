"""Limits of time that hold on a busy machine too."""

import time
from collections.abc import Callable


def quickest(run: Callable[[], object], limit: float, tries: int = 3) -> float:
    """Seconds of the quickest of some runs: what slows the others down is not ours.

    Args:
        run: What is timed; it must do the same work whenever it is called.
        limit: No further run is made after one that took less.
        tries: How many runs at most.
    """
    least = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
        if least < limit:
            break
    return least
