"""The figures of a finished run, as `metrics.json` holds them."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bridge.peft.dtypes import dtype_name
from bridge.peft.finetune.prepare import Prepared
from bridge.peft.finetune.trainer import AdapterTrainer
from bridge.peft.version import __version__

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "safetensors")


def run_metrics(
    trainer: AdapterTrainer, prepared: Prepared, output: Path, *, seconds: float
) -> dict[str, Any]:
    """Return losses, speed and sizes; a resumed run's speed is that of the steps since.

    Args:
        trainer: after training.
        prepared: the data and the plan.
        output: where the adapter lies.
        seconds: this process trained and evaluated for; the speed leaves evaluation out.
    """
    state, before = trainer.state, trainer.before
    _, losses = loss_points(state.log_history, "loss")
    _, evaluations = loss_points(state.log_history, "eval_loss")
    since = state.log_history[len(before.log_history) :]
    evaluation_seconds = sum(row.get("eval_runtime", 0.0) for row in since)
    tokens = int(state.num_input_tokens_seen - before.num_input_tokens_seen)
    plan = prepared.plan
    return {
        "eval_loss_before": evaluations[0] if evaluations else None,
        "eval_loss_after": evaluations[-1] if evaluations else None,
        "train_loss": losses[-1],
        "steps": state.global_step,
        "resumed_from_step": before.global_step,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / max(seconds - evaluation_seconds, 1e-9),
        "train_samples": len(prepared.train),
        "eval_samples": len(prepared.evaluation),
        "trainable_parameters": plan.trainable,
        "model_parameters": plan.base_parameters + plan.trainable,
        "adapter_bytes": (output / "adapter_model.safetensors").stat().st_size,
        "peak_memory_bytes": peak_memory_bytes(),
        "dtype": dtype_name(prepared.dtype),
        "device": str(trainer.args.device),
        "processes": trainer.args.world_size,
        "seed": trainer.args.seed,
        "versions": {
            "python": platform.python_version(),
            "bridge-peft": __version__,
            **{package: version(package) for package in _PACKAGES},
        },
    }


def loss_points(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one quantity in a trainer's log history."""
    points = [(row["step"], row[key]) for row in history if key in row]
    return [step for step, _ in points], [value for _, value in points]


def peak_memory_bytes() -> int:
    """Return the most memory this process held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
