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

with quiet_imports():
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_PLAIN_LINES = 10
_ECHO_SECONDS = 0.5  # torchrun passes on to its workers what the terminal has sent them already


class StopOnSignal(TrainerCallback):
    """Stop after the current step, with a checkpoint, on Ctrl-C or SIGTERM.

    A context manager: the handlers are in place inside it only. A second signal stops at once.

    Attributes:
        received: the signal's number, or None.
        stopped: whether training was cut short by it.
    """

    def __init__(self, console: Console) -> None:
        self.received: int | None = None
        self.stopped = False
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
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint and the end of training once a signal was seen."""
        if self._seen_anywhere(args.device) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self.received, self._first_at = number, now
            self._console.print(
                "Stopping after this step, with a checkpoint (again: stop at once)."
            )
        elif now - self._first_at > _ECHO_SECONDS:
            raise KeyboardInterrupt

    def _seen_anywhere(self, device: torch.device) -> bool:
        """All processes must stop at the same step, or the others wait for ever."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.received is not None
        seen = torch.tensor(self.received or 0, device=device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        self.received = int(seen) or None
        return self.received is not None


class StopOnNan(TrainerCallback):
    """End a run whose loss is no number any more: every later checkpoint would hold NaN."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise.

        Raises:
            AdapterError: the training or evaluation loss is NaN or infinite.
        """
        for key, name in (("loss", "loss"), ("eval_loss", "evaluation loss")):
            value = float((logs or {}).get(key, 0.0))
            if not math.isfinite(value):
                raise AdapterError(
                    f"the {name} is {value} at step {state.global_step}; lower --learning-rate or "
                    "lengthen --warmup, and start again with --overwrite"
                )


class ShowProgress(TrainerCallback):
    """A bar with loss and time left on a terminal, about ten plain lines elsewhere.

    Attributes:
        evaluation_seconds: how long this process has evaluated.
    """

    def __init__(self, console: Console) -> None:
        self.evaluation_seconds = 0.0
        self._console = console
        self._bar: Progress | None = None
        self._task: Any = None
        self._loss: float | None = None
        self._started = 0.0
        self._next_line = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar, and let this process's intervals win over a checkpoint's."""
        state.compute_steps(args, state.max_steps)
        self._started = time.perf_counter()
        self._next_line = state.global_step
        if self._console.is_terminal and state.is_world_process_zero:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(
                "", total=state.max_steps, completed=state.global_step, loss="-"
            )
            self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar, or print a line now and then."""
        if self._bar is not None:
            loss = "-" if self._loss is None else f"{self._loss:.4f}"
            self._bar.update(self._task, completed=state.global_step, loss=loss)
        elif args.eval_strategy == "no" and state.global_step >= self._next_line:
            self._next_line = state.global_step + max(1, state.max_steps // _PLAIN_LINES)
            self._print_line(state, "")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the evaluation loss."""
        if metrics:
            self.evaluation_seconds += metrics.get("eval_runtime", 0.0)
            self._print_line(state, f"  evaluation loss {metrics['eval_loss']:.4f}")

    def _print_line(self, state: TrainerState, more: str) -> None:
        seconds = time.perf_counter() - self._started
        loss = "" if self._loss is None else f"  training loss {self._loss:.4f}"
        self._console.print(
            f"step {state.global_step}/{state.max_steps}  {seconds:.0f} s{loss}{more}"
        )

    def close(self) -> None:
        """Take the bar away, however training ended."""
        if self._bar is not None:
            self._bar.stop()
