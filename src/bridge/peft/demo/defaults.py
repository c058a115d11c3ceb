"""The settings that teach the demo's task, and the limits its result must keep."""

from __future__ import annotations

from typing import Any

#: Fields of the `LoRA` recipe.
DEMO_LORA: dict[str, Any] = {"target_modules": "all-linear", "dim": 8, "alpha": 32}
#: Fields of the training options; the warm-up is a share of all steps.
DEMO_TRAINING: dict[str, Any] = {
    "learning_rate": 3e-3,
    "schedule": "linear",
    "warmup": 0.2,
    "steps": 200,
    "batch_size": 64,
}
#: How many questions are drawn from each split.
DEMO_EXAMPLES = {"train": 4000, "held_out": 500}

# exact match on held-out questions answered in words, shares in 0..1
DEMO_BEFORE_AT_MOST = 0.05
DEMO_AFTER_AT_LEAST = 0.90
