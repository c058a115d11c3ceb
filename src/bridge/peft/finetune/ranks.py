"""Which process of a run this one is, as torchrun tells it, and its part of a batch."""

from __future__ import annotations

import os

import torch

from bridge.peft.errors import AdapterError
from bridge.peft.finetune.options import TrainingOptions


def process_count() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Return which of them this one is."""
    return int(os.environ.get("RANK", "0"))


def data_parts(options: TrainingOptions) -> int:
    """Return among how many processes the samples of a batch are shared out."""
    return 1 if options.parallel == "tp" else process_count()


def part_of_batch(options: TrainingOptions) -> int:
    """Return how many samples of each batch a device takes.

    Raises:
        AdapterError: They cannot be shared out evenly.
    """
    parts, of = data_parts(options), "processes"
    if process_count() == 1:  # transformers trains on every GPU that it sees
        parts, of = max(torch.cuda.device_count(), 1), "GPUs"
    if options.batch_size % parts:
        below = options.batch_size // parts * parts
        fits = f"{below} or {below + parts}" if below else f"{parts}"
        raise AdapterError(
            f"--batch-size is {options.batch_size} samples in all, which {parts} {of} cannot share "
            f"evenly; pass {fits}, or use another number of {of}"
        )
    return options.batch_size // parts
