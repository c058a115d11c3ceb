"""Run a test's body on several processes that talk over gloo."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import coverage
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_PATIENCE_SECONDS = 120.0
#: The environment variable that names where the ranks' lines are counted.
_MEASURED = "COVERAGE_OF_RANKS"


def on_ranks(count: int, body: Callable[[], None], directory: Path) -> None:
    """Call `body()` in `count` fresh processes with a process group; the first error is raised.

    Args:
        count: How many processes.
        body: A function of a module, so that it can be sent to them.
        directory: Where they find each other; empty.
    """
    if coverage.Coverage.current() is not None:
        os.environ.setdefault(_MEASURED, str(Path.cwd()))
    mp.spawn(_run, args=(count, body, directory), nprocs=count)


def _run(rank: int, count: int, body: Callable[[], None], directory: Path) -> None:
    measured = _measured()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))  # of one machine
    rendezvous = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", rank=rank, world_size=count, init_method=rendezvous)
    body()
    if measured is not None:
        measured.stop()
        measured.save()
    # gloo aborts a process whose peer leaves first, so all leave together, without its teardown
    (directory / f"done-{rank}").touch()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while len(list(directory.glob("done-*"))) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    os._exit(0)


def _measured() -> coverage.Coverage | None:
    """What counts the lines that this rank runs, where those of the tests are counted."""
    if (root := os.environ.get(_MEASURED)) is None:
        return None
    measured = coverage.Coverage(
        data_file=f"{root}/.coverage", data_suffix=True, config_file=f"{root}/pyproject.toml"
    )
    measured.start()
    return measured
