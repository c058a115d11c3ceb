"""A disk that is too small, told before a run, or that fills up during one."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge.peft.errors import AdapterError
from bridge.peft.finetune.record import checkpoints, resume_command
from bridge.peft.plan import Plan

_FULL = (errno.ENOSPC, errno.EDQUOT)
# in the words of safetensors, and of torch.save, whose writer fails for hardly another reason
_FULL_WORDS = ("No space left", "inline_container.cc", "iostream error")


def check_disk_space(plan: Plan, output: Path, *, keep: int) -> None:
    """Check that the kept checkpoints, one more being written and the final adapter fit."""
    more = max(keep + 1 - len(checkpoints(output)), 1)
    needed = more * (plan.adapter_file_bytes + plan.optimizer_bytes) + plan.adapter_file_bytes
    existing = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        parts = f"{more} checkpoint{'s' if more > 1 else ''} and the adapter"
        raise AdapterError(
            f"no disk space for the run: {output} needs {needed / 1e6:,.1f} MB ({parts}) and "
            f"{existing} has {free / 1e6:,.1f} MB free; free some, lower --keep-checkpoints or "
            "--dim"
        )


@contextmanager
def disk_full_told(output: Path) -> Iterator[None]:
    """Turn a full disk, wherever it is met inside, into one error that says what was kept."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        again = "start again with --overwrite"
        if kept := checkpoints(output):
            again = f"continue from {kept[-1].name}: {resume_command(output)}"
        raise AdapterError(f"no space left on the disk; free some and {again}") from error


def is_disk_full(error: BaseException | None) -> bool:
    """Tell a full disk, which torch and `save_adapter` report as errors of their own."""
    while error is not None:
        full = getattr(error, "errno", None) in _FULL
        if full or any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
