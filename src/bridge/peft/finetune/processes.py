"""The processes of one run, as torchrun starts them: joined early, told of each other's errors.

An error that any of them meets is raised by all of them in the same words, so that none waits for
one that has left; a process that was killed or hangs is told by those that waited for it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bridge.peft.errors import AdapterError, MissingExtraError, UnsupportedLinearError
from bridge.peft.finetune.models import quiet_imports
from bridge.peft.finetune.ranks import process_count
from bridge.peft.finetune.record import checkpoints, resume_command

with quiet_imports():
    from accelerate import PartialState

# what gloo says of a process that has gone or does not answer; NCCL's errors are a type
_LOST_WORDS = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
#: Groups of runs that have ended, kept until the process leaves. A model in DistributedDataParallel
#: outlives its group, and would be the last to let go of it, holding Python's lock: gloo's thread
#: may wait for that lock while the group's end waits for gloo's thread.
_ended: list[Any] = []
_TOLD = (AdapterError, UnsupportedLinearError, MissingExtraError)


@contextlib.contextmanager
def joined(timeout: int, output: Path) -> Iterator[None]:
    """Inside, the processes can talk; one that has gone is an `AdapterError` of those that wait.

    Args:
        timeout: Seconds that a process waits for the others.
        output: The run's directory, for the message.
    """
    if process_count() == 1:
        yield
        return
    is_ours = not dist.is_initialized()
    try:
        with _lost_told(timeout, output):
            PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=timeout))
            yield
    except BaseException:
        # torchrun ends the others once the first has left; they are on their way with that code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    finally:
        if is_ours and dist.is_initialized():
            _ended.append(dist.group.WORLD)
            dist.destroy_process_group()


@contextlib.contextmanager
def told_together() -> Iterator[None]:
    """Raise an error of any process inside in all of them, in the words of the first one."""
    if process_count() == 1:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        if is_lost(error):
            raise
        mine = error
    said: list[Any] = [None] * process_count()
    dist.all_gather_object(said, _words(mine))
    if mine is not None and not isinstance(mine, _TOLD):
        raise mine
    failed = [index for index, words in enumerate(said) if words is not None]
    if failed:
        where = "" if len(failed) == len(said) else f" (met by process {failed[0]} of {len(said)})"
        raise AdapterError(f"{said[failed[0]]}{where}") from mine


def is_lost(error: BaseException) -> bool:
    """Tell an error of the network between processes."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_WORDS)


@contextlib.contextmanager
def _lost_told(timeout: int, output: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        again = "start again with --overwrite"
        if kept := checkpoints(output):
            again = f"continue from {kept[-1].name} with --resume: {resume_command(output)}"
        raise AdapterError(
            f"another process of the run has ended, or was silent for {timeout} s (--timeout); "
            f"{again}"
        ) from error


def _words(error: Exception | None) -> str | None:
    if error is None or isinstance(error, _TOLD):
        return None if error is None else str(error)
    return f"{type(error).__name__}: {error}"
