"""The embedded demo: a small model that sums in digits learns to answer in words, and proves it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bridge.peft import disable_adapters
from bridge.peft.demo.defaults import DEMO_AFTER_AT_LEAST, DEMO_BEFORE_AT_MOST, DEMO_EXAMPLES
from bridge.peft.demo.tasks import Example, digit_examples, exact_match, word_examples
from bridge.peft.finetune.models import load_model, load_tokenizer
from bridge.peft.finetune.prepare import base_dtype
from bridge.peft.finetune.record import RunSpec
from bridge.peft.finetune.run import finish, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES_SHOWN = 5
_SMALL_SHARE = 0.1


def train_demo(
    spec: RunSpec, output: Path, console: Console, *, resume: bool, overwrite: bool
) -> int:
    """Train the demo, measure before and after, and check the figures it promises.

    Returns 0 if all hold, 1 if one does not (it is named), 128 + N if signal N stopped it.
    """
    started = time.perf_counter()
    # So small a model gains nothing from more threads, and loses much where cores are busy.
    torch.set_num_threads(1)
    console.print("The base model answers 17+25= with 42. LoRA teaches it to answer forty-two.")
    tokenizer = load_tokenizer(spec.model)
    base = load_model(spec.model, base_dtype(spec.options))
    questions = word_examples("held_out", DEMO_EXAMPLES["held_out"])
    words_before, answers_before = exact_match(base, tokenizer, questions)
    digits_before, logits_before = _digits(base, tokenizer)
    outcome = train(spec, output, console, resume=resume, overwrite=overwrite)
    if outcome.metrics is None:
        return finish(spec, outcome, output, console)
    words_after, answers_after = exact_match(outcome.model, tokenizer, questions)
    with disable_adapters(outcome.model):
        digits_disabled, logits_disabled = _digits(outcome.model, tokenizer)
    figures = {
        "exact_match_before": words_before,
        "exact_match_after": words_after,
        "base_task_before": digits_before,
        "base_task_adapters_disabled": digits_disabled,
        "base_logits_bit_for_bit": torch.equal(logits_before, logits_disabled),
        "seconds_in_all": time.perf_counter() - started,
    }
    metrics = {**outcome.metrics, "demo": figures}
    _print_samples(console, questions, answers_before, answers_after)
    failed = _print_promises(console, metrics)
    finish(spec, replace(outcome, metrics=metrics), output, console)
    seconds = time.perf_counter() - started
    if failed:
        console.print(f"The demo failed in {seconds:.0f} s: {'; '.join(failed)}.", style="red")
        return 1
    console.print(f"The demo keeps its promises, in {seconds:.0f} s.", style="green")
    return 0


def _digits(model: PreTrainedModel, tokenizer: Any) -> tuple[float, Tensor]:
    """The base task: the share of right answers in 0..1, and the logits on its questions."""
    rows = digit_examples("held_out", DEMO_EXAMPLES["held_out"])
    right, _ = exact_match(model, tokenizer, rows)
    prompts = [row["prompt"] for row in rows]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    model.eval()
    with torch.no_grad():
        return right, model(**inputs.to(model.device)).logits


def _promises(metrics: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """What the demo promises: a figure's name, what was measured, whether it holds."""
    demo = metrics["demo"]
    before, after = demo["exact_match_before"], demo["exact_match_after"]
    base, disabled = demo["base_task_before"], demo["base_task_adapters_disabled"]
    same = demo["base_logits_bit_for_bit"]
    share = metrics["trainable_parameters"] / metrics["model_parameters"]
    least, most = DEMO_AFTER_AT_LEAST, DEMO_BEFORE_AT_MOST
    said = "bit for bit the same" if same else "not the same"
    return [
        (f"right in words before: at most {most:.0%}", f"{before:.1%}", before <= most),
        (f"right in words after: at least {least:.0%}", f"{after:.1%}", after >= least),
        (
            "right in digits, adapters disabled: as before",
            f"{base:.1%}, then {disabled:.1%}",
            base == disabled,
        ),
        ("logits, adapters disabled: as before", said, same),
        (f"adapter: below {_SMALL_SHARE:.0%} of the model", f"{share:.1%}", share < _SMALL_SHARE),
    ]


def _print_samples(
    console: Console, questions: list[Example], before: list[str], after: list[str]
) -> None:
    columns = ("question", "before", "after", "right answer")
    table = Table(*columns, title="Held-out questions", title_justify="left")
    for row, old, new in list(zip(questions, before, after, strict=True))[:_SAMPLES_SHOWN]:
        table.add_row(row["prompt"], old, new, row["completion"])
    console.print(table)


def _print_promises(console: Console, metrics: dict[str, Any]) -> list[str]:
    """Print the table and return the names of the figures that do not hold."""
    promises = _promises(metrics)
    table = Table("figure", "measured", "", title="What the demo promises", title_justify="left")
    for name, measured, holds in promises:
        table.add_row(name, measured, Text("holds", "green") if holds else Text("fails", "red"))
    console.print(table)
    return [name for name, _, holds in promises if not holds]
