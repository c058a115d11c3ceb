"""The options of a training run: one frozen dataclass, from which the flags are generated."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from bridge.peft.errors import AdapterError

MAX_SEED = 2**32 - 1  # the most that NumPy's generator, which transformers seeds too, takes

Schedule = Literal["cosine", "linear", "constant"]
BaseDtype = Literal["float32", "bfloat16", "float16"]
OnLong = Literal["error", "drop", "truncate"]


def _about(text: str, *, choices: Any = None, steers: bool = True) -> dict[str, Any]:
    """A field's metadata; `steers` says whether a resumed run must keep its value."""
    return {"help": text, "choices": get_args(choices), "steers": steers}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train; checked once, on construction. Each field's metadata holds its help.

    Raises:
        AdapterError: a value out of range; the message names the flag.
    """

    learning_rate: float = field(default=2e-4, metadata=_about("Peak learning rate of AdamW."))
    schedule: Schedule = field(
        default="cosine", metadata=_about("Learning rate after the warm-up", choices=Schedule)
    )
    warmup: float = field(
        default=0.03,
        metadata=_about("Steps in which the learning rate rises from 0; below 1, a share of all."),
    )
    weight_decay: float = field(default=0.0, metadata=_about("Decoupled weight decay."))
    max_grad_norm: float = field(
        default=1.0, metadata=_about("Gradients are clipped to this norm; 0 clips nothing.")
    )
    epochs: float = field(default=3.0, metadata=_about("Passes over the data."))
    steps: int | None = field(default=None, metadata=_about("Optimizer steps instead of --epochs."))
    batch_size: int = field(default=8, metadata=_about("Samples per batch on each device."))
    gradient_accumulation: int = field(
        default=1, metadata=_about("Batches summed into one optimizer step.")
    )
    max_length: int | None = field(
        default=None,
        metadata=_about("Most tokens in a sample; default 1024, or the model's limit where lower."),
    )
    on_long: OnLong = field(
        default="error", metadata=_about("What to do with longer samples", choices=OnLong)
    )
    dtype: BaseDtype | None = field(
        default=None,
        metadata=_about(
            "Dtype of the base weights, default float32 on CPU and bfloat16 on CUDA",
            choices=BaseDtype,
        ),
    )
    seed: int = field(
        default=0, metadata=_about("Of the adapter's start, the order of the data and dropout.")
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata=_about("Recompute activations in backward: less memory, about a fifth slower."),
    )
    eval_share: float = field(
        default=0.05, metadata=_about("Share of the data held out where there is no --eval-data.")
    )
    eval_every: int | None = field(
        default=None, metadata=_about("Steps between evaluations; default a tenth of the run.")
    )
    save_every: int | None = field(
        default=None,
        metadata=_about("Steps between checkpoints; default a tenth of the run.", steers=False),
    )
    log_every: int | None = field(
        default=None,
        metadata=_about("Steps between logged losses; default a 200th of the run.", steers=False),
    )
    keep_checkpoints: int = field(
        default=2, metadata=_about("How many of the newest checkpoints are kept.", steers=False)
    )

    def __post_init__(self) -> None:
        """Check every value against its range."""
        _positive(self, "learning_rate", "epochs")
        _not_negative(self, "warmup", "weight_decay", "max_grad_norm", "seed")
        _at_least_one(self, "batch_size", "gradient_accumulation", "keep_checkpoints")
        _at_least_one(self, "steps", "eval_every", "save_every", "log_every")
        if self.max_length is not None and self.max_length < 2:
            raise AdapterError(f"--max-length is {self.max_length}; pass at least 2 tokens")
        if self.seed > MAX_SEED:
            raise AdapterError(f"--seed is {self.seed}; pass {MAX_SEED} or less")
        if not 0 <= self.eval_share < 1:
            raise AdapterError(f"--eval-share is {self.eval_share}; pass 0 or more, below 1")
        for name in ("schedule", "on_long", "dtype"):
            _one_of(self, name)


def flag(name: str) -> str:
    """Return the flag of a field: `batch_size` is `--batch-size`."""
    return "--" + name.lower().replace("_", "-")


def total_steps(options: TrainingOptions, samples: int, *, processes: int) -> int:
    """Count the optimizer steps of a run; each process takes whole batches of its own."""
    if options.steps is not None:
        return options.steps
    batches = math.ceil(math.ceil(samples / options.batch_size) / processes)
    return math.ceil(options.epochs * math.ceil(batches / options.gradient_accumulation))


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
