"""The figures of a finished run, as `metrics.json` holds them."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bridge.peft.finetune.prepare import Prepared
from bridge.peft.finetune.trainer import AdapterTrainer

_PACKAGES = ("bridge-peft", "torch", "transformers", "trl", "accelerate", "safetensors")


def training_figures(
    trainer: AdapterTrainer, *, seconds: float, evaluation_seconds: float
) -> dict[str, Any]:
    """Return losses and speed; a resumed run's speed is that of the steps since it was resumed.

    Args:
        trainer: after training.
        seconds: this process trained and evaluated for.
        evaluation_seconds: of these, for evaluation; the speed leaves them out.
    """
    history = trainer.state.log_history
    _, losses = loss_points(history, "loss")
    _, evaluations = loss_points(history, "eval_loss")
    tokens = trainer.state.num_input_tokens_seen - trainer.tokens_before
    return {
        "eval_loss_before": evaluations[0] if evaluations else None,
        "eval_loss_after": evaluations[-1] if evaluations else None,
        "train_loss": losses[-1],
        "steps": trainer.state.global_step,
        "resumed_from_step": trainer.step_before,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / max(seconds - evaluation_seconds, 1e-9),
    }


def sizes(trainer: AdapterTrainer, prepared: Prepared, output: Path) -> dict[str, Any]:
    """Return the sizes of data, model, adapter and memory, and what the run was made with."""
    model: Any = trainer.model
    plan = prepared.plan
    return {
        "train_samples": len(prepared.train),
        "eval_samples": len(prepared.evaluation),
        "trainable_parameters": plan.trainable,
        "model_parameters": plan.base_parameters + plan.trainable,
        "adapter_bytes": (output / "adapter_model.safetensors").stat().st_size,
        "peak_memory_bytes": peak_memory_bytes(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(trainer.args.device),
        "processes": trainer.args.world_size,
        "seed": trainer.args.seed,
        "versions": versions(),
    }


def loss_points(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one quantity in a trainer's log history."""
    points = [(row["step"], row[key]) for row in history if key in row]
    return [step for step, _ in points], [value for _, value in points]


def versions() -> dict[str, str]:
    """Return the versions of what trained: python and the packages."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int:
    """Return the most memory this process held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
