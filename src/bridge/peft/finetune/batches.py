"""Batches of the whole run, cut into one part for each process.

Order and batches depend on the seed and the epoch alone: any number of processes takes the same
steps on the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bridge.peft.branch.initializers import derive_seed
from bridge.peft.finetune.samples import IGNORED

#: The index of a sample that teaches nothing.
BLANK = -1


class GlobalBatches(Sampler[list[int]]):
    """The indices of one process's part of each batch of the run.

    A last batch that has fewer samples than processes leaves some of them `BLANK`.

    Args:
        samples: How many there are.
        batch_size: Samples in a batch of the whole run.
        part: Which part is wanted, from 0.
        parts: How many processes share a batch.
        seed: Of the order, drawn anew in each epoch; None keeps the samples' own.
    """

    def __init__(
        self, samples: int, batch_size: int, *, part: int, parts: int, seed: int | None = None
    ) -> None:
        self.epoch = 0
        self._samples, self._batch_size, self._seed = samples, batch_size, seed
        self._part, self._parts = part, parts

    def __len__(self) -> int:
        return -(-self._samples // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for start in range(0, self._samples, self._batch_size):
            batch = order[start : start + self._batch_size]
            first, end = (len(batch) * i // self._parts for i in (self._part, self._part + 1))
            yield batch[first:end] or [BLANK]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next."""
        self.epoch = epoch

    def _order(self) -> list[int]:
        if self._seed is None:
            return list(range(self._samples))
        generator = torch.Generator().manual_seed(derive_seed(self._seed, f"epoch {self.epoch}"))
        return torch.randperm(self._samples, generator=generator).tolist()


class BatchLoader(DataLoader[Any]):
    """A loader of `GlobalBatches` that Trainer can tell the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next."""
        assert isinstance(self.batch_sampler, GlobalBatches)
        self.batch_sampler.set_epoch(epoch)


class WithBlank(Dataset[dict[str, list[int]]]):
    """Samples, and at `BLANK` two tokens without a label."""

    def __init__(self, samples: Sequence[dict[str, list[int]]]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if index == BLANK:
            return {"input_ids": [0, 0], "labels": [IGNORED, IGNORED]}
        return self._samples[index]


def targets(labels: torch.Tensor) -> torch.Tensor:
    """Count the tokens that a batch of labels (samples, tokens) has predicted: never the first."""
    return (labels[:, 1:] != IGNORED).sum()
