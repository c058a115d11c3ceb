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
from bridge.peft.cli.models import load_model, load_tokenizer
from bridge.peft.cli.training.prepare import base_dtype
from bridge.peft.cli.training.record import RunSpec
from bridge.peft.cli.training.run import finish, say_how_to_resume, train
from bridge.peft.demo import (
    DEMO_AFTER_AT_LEAST,
    DEMO_BEFORE_AT_MOST,
    DEMO_EXAMPLES,
    digit_examples,
    exact_match,
    word_examples,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLES_SHOWN = 5
_SMALL_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What a model answers: shares in 0..1, and the logits of the digits task's prompts."""

    words: float
    digits: float
    shown: list[str]
    logits: Tensor


def train_demo(
    spec: RunSpec, output: Path, console: Console, *, resume: bool, overwrite: bool
) -> int:
    """Train the demo, measure before and after, and check the figures it promises.

    Returns:
        0 if every figure holds, 1 if one does not (it is named), 128 + N if signal N stopped it.
    """
    started = time.perf_counter()
    console.print("The base model answers 17+25= with 42. LoRA teaches it to answer forty-two.")
    tokenizer = load_tokenizer(spec.model)
    before = _measure(load_model(spec.model, base_dtype(spec.options)), tokenizer)
    outcome = train(spec, output, console, resume=resume, overwrite=overwrite)
    if outcome.metrics is None:
        return say_how_to_resume(outcome, output, console)
    after = _measure(outcome.model, tokenizer)
    with disable_adapters(outcome.model):
        disabled = _measure(outcome.model, tokenizer)
    figures = _figures(before, after, disabled, outcome.metrics)
    demo = {
        "exact_match_before": before.words,
        "exact_match_after": after.words,
        "base_task_before": before.digits,
        "base_task_disabled": disabled.digits,
        "base_logits_bit_exact": torch.equal(before.logits, disabled.logits),
        "seconds_in_all": time.perf_counter() - started,
    }
    finish(spec, {**outcome.metrics, "demo": demo}, output, console)
    _print_samples(console, before, after)
    return _print_figures(console, figures, time.perf_counter() - started)


def _measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> _Answers:
    words, shown = exact_match(model, tokenizer, _held_out_words())
    digits, _ = exact_match(model, tokenizer, _held_out_digits())
    prompts = [row["prompt"] for row in _held_out_digits()]
    model.eval()
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs.to(model.device)).logits
    return _Answers(words=words, digits=digits, shown=shown[:_SAMPLES_SHOWN], logits=logits)


def _held_out_words() -> Sequence[dict[str, str]]:
    return word_examples("held_out", DEMO_EXAMPLES["held_out"])


def _held_out_digits() -> Sequence[dict[str, str]]:
    return digit_examples("held_out", DEMO_EXAMPLES["held_out"])


def _figures(
    before: _Answers, after: _Answers, disabled: _Answers, metrics: dict[str, Any]
) -> list[tuple[str, str, bool]]:
    """What the demo promises: a name, what was measured, whether it holds."""
    share = metrics["trainable_parameters"] / metrics["model_parameters"]
    same = torch.equal(before.logits, disabled.logits)
    return [
        (
            f"in words before, at most {DEMO_BEFORE_AT_MOST:.0%} right",
            f"{before.words:.1%}",
            before.words <= DEMO_BEFORE_AT_MOST,
        ),
        (
            f"in words after, at least {DEMO_AFTER_AT_LEAST:.0%} right",
            f"{after.words:.1%}",
            after.words >= DEMO_AFTER_AT_LEAST,
        ),
        (
            "in digits with the adapter disabled, as before",
            f"{before.digits:.1%} and {disabled.digits:.1%}",
            before.digits == disabled.digits,
        ),
        ("logits with the adapter disabled, as before", "bit for bit" if same else "differ", same),
        (
            f"adapter below {_SMALL_SHARE:.0%} of the parameters",
            f"{share:.1%}",
            share < _SMALL_SHARE,
        ),
    ]


def _print_samples(console: Console, before: _Answers, after: _Answers) -> None:
    table = Table(title="Held-out questions", title_justify="left")
    for name in ("question", "before", "after", "right answer"):
        table.add_column(name)
    rows = _held_out_words()[:_SAMPLES_SHOWN]
    for row, old, new in zip(rows, before.shown, after.shown, strict=True):
        table.add_row(row["prompt"], old, new, row["completion"])
    console.print(table)


def _print_figures(console: Console, figures: list[tuple[str, str, bool]], seconds: float) -> int:
    table = Table(title="What the demo promises", title_justify="left")
    for name in ("figure", "measured", ""):
        table.add_column(name)
    for name, measured, holds in figures:
        table.add_row(name, measured, Text("holds", "green") if holds else Text("fails", "red"))
    console.print(table)
    failed = [name for name, _, holds in figures if not holds]
    if failed:
        console.print(f"The demo failed: {'; '.join(failed)} ({seconds:.0f} s).", style="red")
        return 1
    console.print(f"The demo holds what it promises, in {seconds:.0f} s.", style="green")
    return 0
