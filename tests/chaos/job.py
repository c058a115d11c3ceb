"""The ranks of a command, forked from a process that has imported all they need."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from bridge.peft.cli import main


def forked(body: Callable[[], int], log: Path) -> int:
    """Run `body` in a child that exits with what it returns; its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 1
    try:
        code = body()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Job:
    """One start of `bridge-peft finetune` on some ranks.

    No launcher stands over them: a rank that is killed is noticed by the others alone.
    """

    def __init__(self, arguments: Iterable[object], directory: Path, *, ranks: int) -> None:
        words = ["finetune", *map(str, arguments)]
        self.logs = [directory / f"rank-{rank}.log" for rank in range(ranks)]
        port = _free_port()
        self._pids = [
            forked(lambda rank=rank: _rank(words, rank, ranks, port), log)
            for rank, log in enumerate(self.logs)
        ]
        self.codes: list[int | None] = [None] * ranks

    def signal(self, ranks: Iterable[int], number: int = signal.SIGKILL) -> None:
        """Send a signal to some ranks."""
        for rank in ranks:
            if self.codes[rank] is None:
                os.kill(self._pids[rank], number)

    def running(self) -> bool:
        """Whether any rank still runs."""
        for rank, pid in enumerate(self._pids):
            if self.codes[rank] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return None in self.codes

    def wait(self, seconds: float) -> float | None:
        """Wait for all ranks to leave: how long it took; None, and all killed, if too long."""
        begun = time.monotonic()
        while self.running():
            if time.monotonic() - begun > seconds:
                self.signal(range(len(self._pids)))
                self.wait(10)
                return None
            time.sleep(0.005)
        return time.monotonic() - begun

    def said(self) -> str:
        """What all ranks have printed."""
        return "".join(log.read_text() for log in self.logs)


def _rank(words: list[str], rank: int, ranks: int, port: int) -> int:
    if ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return main(words)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
