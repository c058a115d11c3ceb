"""The settings that teach the demo's task, and the limits its result must keep."""

from __future__ import annotations

from typing import Final, TypedDict


class DemoLora(TypedDict):
    """Fields of the `LoRA` recipe."""

    target_modules: str
    dim: int
    alpha: int


class DemoTraining(TypedDict):
    """Training settings: examples a step, steps, and the learning rate with its schedule."""

    learning_rate: float
    schedule: str
    warmup_steps: float
    steps: int
    batch_size: int


class DemoExamples(TypedDict):
    """How many questions are drawn from each split."""

    train: int
    held_out: int


DEMO_LORA: Final[DemoLora] = {"target_modules": "all-linear", "dim": 8, "alpha": 32}
DEMO_TRAINING: Final[DemoTraining] = {
    "learning_rate": 3e-3,
    "schedule": "linear",
    "warmup_steps": 0.2,  # below 1: a share of all steps
    "steps": 200,
    "batch_size": 64,
}
DEMO_EXAMPLES: Final[DemoExamples] = {"train": 4000, "held_out": 500}

# exact match on held-out questions answered in words, shares in 0..1
DEMO_BEFORE_AT_MOST: Final = 0.05
DEMO_AFTER_AT_LEAST: Final = 0.90
