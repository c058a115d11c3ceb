"""The options of a training run: one frozen dataclass, from which the flags are generated."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from bridge.peft.errors import AdapterError

SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("float32", "bfloat16", "float16")
ON_LONG = ("error", "drop", "truncate")


def _option(default: Any, text: str, *, choices: tuple[str, ...] = (), steers: bool = True) -> Any:
    """A field with its help; `steers` says whether a resumed run must keep its value."""
    metadata = {"help": text, "choices": choices, "steers": steers}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train; checked once, on construction.

    Raises:
        AdapterError: a value out of range; the message names the flag.
    """

    learning_rate: float = _option(2e-4, "Peak learning rate of AdamW.")
    schedule: str = _option("cosine", "Learning rate after the warm-up.", choices=SCHEDULES)
    warmup: float = _option(
        0.03, "Steps in which the learning rate rises from 0; below 1, a share of all steps."
    )
    weight_decay: float = _option(0.0, "Decoupled weight decay.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm; 0 clips nothing.")
    epochs: float = _option(3.0, "Passes over the data; --steps overrides it.")
    steps: int | None = _option(None, "Optimizer steps, instead of --epochs.")
    batch_size: int = _option(8, "Samples per step on each device.")
    gradient_accumulation: int = _option(1, "Batches summed into one optimizer step.")
    max_length: int | None = _option(
        None, "Most tokens in a sample; default 1024, or the model's own limit where lower."
    )
    on_long: str = _option("error", "What to do with longer samples.", choices=ON_LONG)
    dtype: str | None = _option(
        None, "Of the base weights; default float32 on CPU, bfloat16 on CUDA.", choices=DTYPES
    )
    seed: int = _option(0, "Of the adapter's start, the order of the data and dropout.")
    gradient_checkpointing: bool = _option(
        False, "Recompute activations in backward: less memory, about a fifth slower."
    )
    eval_share: float = _option(
        0.05, "Share of the data held out for evaluation when there is no --eval-data."
    )
    eval_every: int | None = _option(None, "Steps between evaluations; default a tenth of the run.")
    save_every: int | None = _option(
        None, "Steps between checkpoints; default a tenth of the run.", steers=False
    )
    log_every: int | None = _option(
        None, "Steps between logged losses; default a 200th of the run.", steers=False
    )
    keep_checkpoints: int = _option(2, "Newest checkpoints kept.", steers=False)

    def __post_init__(self) -> None:
        """Check every value against its range."""
        _positive(self, "learning_rate", "epochs")
        _not_negative(self, "warmup", "weight_decay", "max_grad_norm", "seed")
        _at_least_one(self, "batch_size", "gradient_accumulation", "keep_checkpoints")
        _at_least_one(self, "steps", "eval_every", "save_every", "log_every")
        if self.max_length is not None and self.max_length < 2:
            raise AdapterError(f"--max-length is {self.max_length}; pass at least 2 tokens")
        if not 0 <= self.eval_share < 1:
            raise AdapterError(f"--eval-share is {self.eval_share}; pass 0 or more, below 1")
        for name in ("schedule", "on_long", "dtype"):
            _one_of(self, name)


def flag(name: str) -> str:
    """Return the flag of a field: `batch_size` is `--batch-size`."""
    return "--" + name.lower().replace("_", "-")


def steering_fields() -> list[str]:
    """Return the options that decide what is learned: a resumed run must keep them."""
    return [f.name for f in dataclasses.fields(TrainingOptions) if f.metadata["steers"]]


def _positive(options: TrainingOptions, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not (math.isfinite(value) and value > 0):
            raise AdapterError(f"{flag(name)} is {value}; pass a number above 0")


def _not_negative(options: TrainingOptions, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= 0):
            raise AdapterError(f"{flag(name)} is {value}; pass 0 or more")


def _at_least_one(options: TrainingOptions, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise AdapterError(f"{flag(name)} is {value}; pass 1 or more")


def _one_of(options: TrainingOptions, name: str) -> None:
    value = getattr(options, name)
    choices = next(f for f in dataclasses.fields(options) if f.name == name).metadata["choices"]
    if value is not None and value not in choices:
        raise AdapterError(f"{flag(name)} is {value!r}; pass one of {', '.join(choices)}")
