"""A disk that is too small, told before a run, or that fills up during one."""

from __future__ import annotations

import errno
import shlex
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge.peft.errors import AdapterError
from bridge.peft.finetune.record import RunSpec, checkpoints
from bridge.peft.plan import Plan

_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_disk_space(spec: RunSpec, plan: Plan, output: Path) -> None:
    """Check that the kept checkpoints, one more being written and the final adapter fit.

    Raises:
        AdapterError: they do not.
    """
    adapter, optimizer = plan.adapter_file_bytes, plan.optimizer_bytes
    more = max(spec.options.keep_checkpoints + 1 - len(checkpoints(output)), 1)
    needed = more * (adapter + optimizer) + adapter
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
    """Turn a full disk, wherever it is met inside, into one error that says what was kept.

    Raises:
        AdapterError: the disk is full.
    """
    hook = threading.excepthook

    def hook_unless_full(args: threading.ExceptHookArgs) -> None:
        # TensorBoard's writer thread dies of it with a traceback; the run itself tells it better
        if args.exc_value is None or not is_disk_full(args.exc_value, output):
            hook(args)

    threading.excepthook = hook_unless_full
    try:
        yield
    except Exception as error:
        if not is_disk_full(error, output):
            raise
        raise AdapterError(_what_was_kept(output)) from error
    finally:
        threading.excepthook = hook


def is_disk_full(error: BaseException, where: Path) -> bool:
    """Tell a full disk, which torch and `save_adapter` report as errors of their own."""
    if any(getattr(e, "errno", None) in _FULL for e in (error, error.__cause__)):
        return True
    text = str(error)
    return "No space left" in text or (
        "PytorchStreamWriter" in text and shutil.disk_usage(where).free < 2**20
    )


def _what_was_kept(output: Path) -> str:
    kept = checkpoints(output)
    if not kept:
        return "no space left on the disk; free some and start again with --overwrite"
    return (
        f"no space left on the disk; free some and continue from {kept[-1].name}: "
        f"bridge-peft finetune --resume --output {shlex.quote(str(output))}"
    )
