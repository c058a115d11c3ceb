"""The options of a training run: one frozen dataclass, from which the flags are generated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bridge.peft.errors import AdapterError

MAX_SEED = 2**32 - 1  # the most that NumPy's generator, which transformers seeds too, takes

Schedule = Literal["cosine", "linear", "constant"]
BaseDtype = Literal["float32", "bfloat16", "float16"]
Quantise = Literal["nf4", "int8"]
OnLong = Literal["error", "drop", "truncate"]
Parallel = Literal["ddp", "fsdp", "tp"]

#: Options that a resumed run may change: they do not decide what is learned.
FREE_ON_RESUME = frozenset({"save_every", "log_every", "keep_checkpoints", "parallel", "timeout"})


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train; checked once, on construction.

    Attributes:
        learning_rate: Peak learning rate of AdamW.
        schedule: Learning rate after the warm-up.
        warmup: Steps in which the learning rate rises from 0; below 1, a share of all steps.
        weight_decay: Decoupled weight decay.
        lora_plus_ratio: Learning rate of B over that of A (LoRA+, whose authors take 16).
        max_grad_norm: Gradients are clipped to this norm; 0 clips nothing.
        epochs: Passes over the data.
        steps: Optimizer steps, instead of --epochs.
        batch_size: Samples per batch, over all processes.
        gradient_accumulation: Batches summed into one optimizer step.
        max_length: Most tokens in a sample; default 1024, or the model's limit where lower.
        on_long: What to do with longer samples.
        dtype: Dtype of the base weights; default float32 on CPU and bfloat16 on CUDA.
        quantize: Quantise the base's linears as they are loaded: nf4 (4 bits) or int8.
        seed: Seed of the adapter's start, the order of the data and dropout.
        gradient_checkpointing: Recompute activations in backward: less memory, about a fifth
            slower.
        eval_share: Share of the data held out where there is no --eval-data.
        eval_every: Steps between evaluations; default a tenth of the run.
        save_every: Steps between checkpoints; default a tenth of the run.
        log_every: Steps between logged losses; default a 200th of the run.
        keep_checkpoints: How many of the newest checkpoints are kept.
        parallel: What the processes of torchrun share out: ddp the samples of a batch, fsdp those
            and the base weights, tp the base weights alone (tensor parallel).
        timeout: Seconds that a process waits for the others before the run ends.

    Raises:
        AdapterError: A value out of range; the message names the flag.
    """

    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    lora_plus_ratio: float = 1.0
    max_grad_norm: float = 1.0
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int | None = None
    on_long: OnLong = "error"
    dtype: BaseDtype | None = None
    quantize: Quantise | None = None
    seed: int = 0
    gradient_checkpointing: bool = False
    eval_share: float = 0.05
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int | None = None
    keep_checkpoints: int = 2
    parallel: Parallel = "ddp"
    timeout: int = 600

    def __post_init__(self) -> None:
        """Check every value against its range."""
        for name in ("learning_rate", "lora_plus_ratio", "epochs"):
            self._check(name, lambda x: math.isfinite(x) and x > 0, "a number above 0")
        for name in ("warmup", "weight_decay", "max_grad_norm", "seed"):
            self._check(name, lambda x: math.isfinite(x) and x >= 0, "0 or more")
        for name in ("batch_size", "gradient_accumulation", "keep_checkpoints", "steps"):
            self._check(name, lambda x: x >= 1, "1 or more")
        for name in ("eval_every", "save_every", "log_every", "timeout"):
            self._check(name, lambda x: x >= 1, "1 or more")
        self._check("max_length", lambda x: x >= 2, "at least 2 tokens")
        self._check("seed", lambda x: x <= MAX_SEED, f"{MAX_SEED} or less")
        self._check("eval_share", lambda x: 0 <= x < 1, "0 or more, below 1")
        choices = {
            "schedule": Schedule,
            "on_long": OnLong,
            "dtype": BaseDtype,
            "parallel": Parallel,
            "quantize": Quantise,
        }
        for name, literal in choices.items():
            known = get_args(literal)
            self._check(name, known.__contains__, f"one of {', '.join(known)}")

    def _check(self, name: str, fits: Callable[[Any], bool], wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not fits(value):
            raise AdapterError(f"{flag(name)} is {value!r}; pass {wanted}")


def flag(name: str) -> str:
    """Return the flag of a field: `batch_size` is `--batch-size`."""
    return "--" + name.lower().replace("_", "-")


def total_steps(options: TrainingOptions, samples: int) -> int:
    """Count the optimizer steps of a run; the trainer is told and counts none itself."""
    if options.steps is not None:
        return options.steps
    batches = math.ceil(samples / options.batch_size)
    return math.ceil(options.epochs * math.ceil(batches / options.gradient_accumulation))
