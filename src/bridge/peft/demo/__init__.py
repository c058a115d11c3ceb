"""The embedded default of `bridge-peft finetune`: a small base model and a task to teach it."""

from __future__ import annotations

from bridge.peft.demo.defaults import (
    DEMO_AFTER_AT_LEAST,
    DEMO_BEFORE_AT_MOST,
    DEMO_EXAMPLES,
    DEMO_LORA,
    DEMO_TRAINING,
)
from bridge.peft.demo.tasks import (
    base_model_dir,
    difference_examples,
    digit_examples,
    exact_match,
    naming_examples,
    number_words,
    questions,
    word_examples,
    write_jsonl,
)

__all__ = [
    "DEMO_AFTER_AT_LEAST",
    "DEMO_BEFORE_AT_MOST",
    "DEMO_EXAMPLES",
    "DEMO_LORA",
    "DEMO_TRAINING",
    "base_model_dir",
    "difference_examples",
    "digit_examples",
    "exact_match",
    "naming_examples",
    "number_words",
    "questions",
    "word_examples",
    "write_jsonl",
]
