"""What tests of the command on several processes share: inputs, outcomes, runs cut short."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.distributed as dist
from torch import Tensor

from bridge.peft.finetune.record import METRICS, checkpoints
from tests.helpers.cli_fixtures import save_tiny_model, sums, write_rows

# 65 samples to train: eight batches and one of a single sample; and 5 to evaluate
ROWS, EVAL_SHARE = 70, 0.07
OPTIONS = [
    *("--dim", 4, "--learning-rate", 5e-3, "--epochs", 2, "--batch-size", 8),
    *("--gradient-accumulation", 2, "--eval-share", EVAL_SHARE),
    *("--eval-every", 3, "--save-every", 3, "--log-every", 1, "--keep-checkpoints", 9),
]


def save_inputs(directory: Path) -> list[object]:
    """A tiny model and its data; the arguments that name them."""
    save_tiny_model(directory / "model")
    write_rows(directory / "data.jsonl", sums(ROWS))
    return arguments(directory)


def arguments(directory: Path) -> list[object]:
    return ["--model", directory / "model", "--data", directory / "data.jsonl", *OPTIONS]


def adapter(output: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(output / "adapter_model.safetensors")


def history(output: Path) -> list[dict[str, Any]]:
    return json.loads((checkpoints(output)[-1] / "trainer_state.json").read_text())["log_history"]


def cut_short(finished: Path, output: Path, *, step: int) -> Path:
    """A copy of a finished run as it was after a checkpoint; the first rank makes it."""
    if os.environ.get("RANK", "0") == "0":
        shutil.copytree(finished, output)
        (output / METRICS).unlink()
        for checkpoint in checkpoints(output):
            if int(checkpoint.name.rpartition("-")[2]) > step:
                shutil.rmtree(checkpoint)
    if dist.is_initialized():
        dist.barrier()
    return output
