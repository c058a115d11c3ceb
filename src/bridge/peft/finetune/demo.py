"""The embedded demo: a small model that sums in digits learns to answer in words, and proves it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bridge.peft import disable_adapters
from bridge.peft.demo import (
    DEMO_AFTER_AT_LEAST,
    DEMO_BEFORE_AT_MOST,
    DEMO_EXAMPLES,
    digit_examples,
    exact_match,
    word_examples,
)
from bridge.peft.finetune.models import load_model, load_tokenizer
from bridge.peft.finetune.prepare import base_dtype
from bridge.peft.finetune.record import RunSpec
from bridge.peft.finetune.run import exit_code_of_stopped, finish, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES_SHOWN = 5
_SMALL_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class _Words:
    """The task to learn: the share of right answers in 0..1, and the first few answers."""

    right: float
    shown: list[str]


@dataclass(frozen=True, kw_only=True)
class _Digits:
    """The base task: the share of right answers in 0..1, and the logits on its questions."""

    right: float
    logits: Tensor


def train_demo(
    spec: RunSpec, output: Path, console: Console, *, resume: bool, overwrite: bool
) -> int:
    """Train the demo, measure before and after, and check the figures it promises.

    Returns:
        0 if every figure holds, 1 if one does not (it is named), 128 + N if signal N stopped it.
    """
    started = time.perf_counter()
    # So small a model gains nothing from more threads, and loses much where cores are busy.
    torch.set_num_threads(1)
    console.print("The base model answers 17+25= with 42. LoRA teaches it to answer forty-two.")
    tokenizer = load_tokenizer(spec.model)
    base = load_model(spec.model, base_dtype(spec.options))
    base_words, base_digits = _measure_words(base, tokenizer), _measure_digits(base, tokenizer)
    outcome = train(spec, output, console, resume=resume, overwrite=overwrite)
    if outcome.metrics is None:
        return exit_code_of_stopped(outcome, output, console)
    words = _measure_words(outcome.model, tokenizer)
    with disable_adapters(outcome.model):
        digits = _measure_digits(outcome.model, tokenizer)
    figures = {
        "exact_match_before": base_words.right,
        "exact_match_after": words.right,
        "base_task_before": base_digits.right,
        "base_task_adapters_disabled": digits.right,
        "base_logits_bit_for_bit": torch.equal(base_digits.logits, digits.logits),
        "seconds_in_all": time.perf_counter() - started,
    }
    metrics = {**outcome.metrics, "demo": figures}
    _print_samples(console, base_words, words)
    failed = _print_promises(console, metrics)
    finish(spec, metrics, output, console)
    seconds = time.perf_counter() - started
    if failed:
        console.print(f"The demo failed in {seconds:.0f} s: {'; '.join(failed)}.", style="red")
        return 1
    console.print(f"The demo holds what it promises, in {seconds:.0f} s.", style="green")
    return 0


def _measure_words(model: PreTrainedModel, tokenizer: Any) -> _Words:
    right, answers = exact_match(model, tokenizer, _held_out_words())
    return _Words(right=right, shown=answers[:_SAMPLES_SHOWN])


def _measure_digits(model: PreTrainedModel, tokenizer: Any) -> _Digits:
    rows = digit_examples("held_out", DEMO_EXAMPLES["held_out"])
    right, _ = exact_match(model, tokenizer, rows)
    prompts = [row["prompt"] for row in rows]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    model.eval()
    with torch.no_grad():
        logits = model(**inputs.to(model.device)).logits
    return _Digits(right=right, logits=logits)


def _held_out_words() -> Sequence[dict[str, str]]:
    return word_examples("held_out", DEMO_EXAMPLES["held_out"])


def _promises(metrics: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """What the demo promises: a figure's name, what was measured, whether it holds."""
    demo = metrics["demo"]
    before, after = demo["exact_match_before"], demo["exact_match_after"]
    base, disabled = demo["base_task_before"], demo["base_task_adapters_disabled"]
    same = demo["base_logits_bit_for_bit"]
    share = metrics["trainable_parameters"] / metrics["model_parameters"]
    return [
        (
            f"right in words before: at most {DEMO_BEFORE_AT_MOST:.0%}",
            f"{before:.1%}",
            before <= DEMO_BEFORE_AT_MOST,
        ),
        (
            f"right in words after: at least {DEMO_AFTER_AT_LEAST:.0%}",
            f"{after:.1%}",
            after >= DEMO_AFTER_AT_LEAST,
        ),
        (
            "right in digits, adapters disabled: as before",
            f"{base:.1%}, then {disabled:.1%}",
            base == disabled,
        ),
        (
            "logits, adapters disabled: as before",
            "bit for bit the same" if same else "not the same",
            same,
        ),
        (f"adapter: below {_SMALL_SHARE:.0%} of the model", f"{share:.1%}", share < _SMALL_SHARE),
    ]


def _print_samples(console: Console, before: _Words, after: _Words) -> None:
    table = Table(title="Held-out questions", title_justify="left")
    for name in ("question", "before", "after", "right answer"):
        table.add_column(name)
    rows = _held_out_words()[:_SAMPLES_SHOWN]
    for row, old, new in zip(rows, before.shown, after.shown, strict=True):
        table.add_row(row["prompt"], old, new, row["completion"])
    console.print(table)


def _print_promises(console: Console, metrics: dict[str, Any]) -> list[str]:
    """Print the table and return the names of the figures that do not hold."""
    promises = _promises(metrics)
    table = Table(title="What the demo promises", title_justify="left")
    for name in ("figure", "measured", ""):
        table.add_column(name)
    for name, measured, holds in promises:
        table.add_row(name, measured, Text("holds", "green") if holds else Text("fails", "red"))
    console.print(table)
    return [name for name, _, holds in promises if not holds]
