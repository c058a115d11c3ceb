"""Beside the training loop: the progress bar, and stopping on Ctrl-C with a checkpoint."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bridge.peft.errors import AdapterError
from bridge.peft.finetune.models import quiet_imports
from bridge.peft.finetune.ranks import process_count

with quiet_imports():
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_PLAIN_LINES = 10
_ECHO_SECONDS = 0.5  # torchrun passes on to its workers what the terminal has sent them already


class StopOnSignal(TrainerCallback):
    """Stop after the current step, with a checkpoint, on Ctrl-C or SIGTERM; at once on a second.

    The handlers are in place inside the context only. `received` is the signal's number, or None;
    `stopped` says whether training was cut short by it.
    """

    def __init__(self, console: Console) -> None:
        self.received: int | None = None
        self.stopped = self._said = False
        self._console = console
        self._first_at: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint and the end of training once a signal was seen."""
        if self._seen_anywhere(args.device) and state.global_step < state.max_steps:
            self._say_so()
            self.stopped = control.should_save = control.should_training_stop = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self.received, self._first_at = number, now
            if process_count() == 1:  # else torchrun may be ending the others of one that failed
                self._say_so()
        elif now - self._first_at > _ECHO_SECONDS:
            raise KeyboardInterrupt

    def _say_so(self) -> None:
        if not self._said:
            line = "Stopping after this step, with a checkpoint (again: stop at once)."
            self._console.print(line)
        self._said = True

    def _seen_anywhere(self, device: torch.device) -> bool:
        """All processes must stop at the same step, or the others wait forever."""
        if dist.is_available() and dist.is_initialized():
            seen = torch.tensor(self.received or 0, device=device)
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
            self.received = int(seen) or None
        return self.received is not None


class StopOnNan(TrainerCallback):
    """End a run whose loss is not a number any more: every later checkpoint would hold NaN."""

    def on_log(self, args: Any, state: TrainerState, control: Any, *, logs: Any, **_: Any) -> None:
        """Raise where the training or evaluation loss is NaN or infinite."""
        for key, name in (("loss", "loss"), ("eval_loss", "evaluation loss")):
            value = float(logs.get(key, 0.0))
            if not math.isfinite(value):
                raise AdapterError(
                    f"the {name} is {value} at step {state.global_step}; lower --learning-rate or "
                    "lengthen --warmup, and start again with --overwrite"
                )


class ShowProgress(TrainerCallback):
    """A bar with loss and time left on a terminal, about ten plain lines elsewhere.

    A context manager: the bar goes away at its end, however training ended.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        loss = TextColumn("loss {task.fields[loss]}")
        columns = ("training", BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())
        plain = not console.is_terminal
        self._bar = Progress(*columns, console=console, transient=True, disable=plain)
        self._task = self._bar.add_task("", loss="-")
        self._loss = ""
        self._started = time.perf_counter()
        self._next_line = 0

    def __enter__(self) -> ShowProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Start the bar, and let this process's intervals win over a checkpoint's."""
        state.compute_steps(args, state.max_steps)
        self._next_line = state.global_step
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_log(self, args: Any, state: TrainerState, control: Any, *, logs: Any, **_: Any) -> None:
        """Remember the loss."""
        if "loss" in logs:
            self._loss = f"{logs['loss']:.4f}"

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Move the bar, or print a line now and then."""
        self._bar.update(self._task, completed=state.global_step, loss=self._loss or "-")
        due = self._bar.disable and args.eval_strategy == "no"
        if due and state.global_step >= self._next_line:
            self._next_line = state.global_step + max(1, state.max_steps // _PLAIN_LINES)
            self._print_line(state)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, *, metrics: Any, **_: Any
    ) -> None:
        """Print the evaluation loss."""
        self._print_line(state, f"  evaluation loss {metrics['eval_loss']:.4f}")

    def _print_line(self, state: TrainerState, more: str = "") -> None:
        seconds = time.perf_counter() - self._started
        loss = f"  training loss {self._loss}" if self._loss else ""
        self._console.print(
            f"step {state.global_step}/{state.max_steps}  {seconds:.0f} s{loss}{more}"
        )
