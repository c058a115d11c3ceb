"""Which part of a matrix one rank holds, cut out of the whole and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The part that this rank holds of a matrix.

    Attributes:
        group: The ranks that hold the parts; None is this process alone.
        dim: Along which dimension the matrix is split; None if every rank holds all of it.
        blocks: The matrix is so many matrices in one along `dim` (a gate over an up projection),
            and each rank has its part of each of them.
    """

    group: dist.ProcessGroup | None = None
    dim: int | None = None
    blocks: int = 1

    def __deepcopy__(self, memo: object) -> Shard:
        # a group of processes cannot be copied, and none of this ever changes
        return self

    @property
    def parts(self) -> int:
        """Into how many parts the matrix is split."""
        return 1 if self.group is None or self.dim is None else self.group.size()

    def shape(self, part: Sequence[int]) -> tuple[int, int]:
        """The shape of the whole matrix whose parts have the shape `part`."""
        rows, columns = part
        if self.dim == 0:
            return rows * self.parts, columns
        return rows, columns * self.parts

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole matrix."""
        if self.parts == 1:
            return whole
        assert self.group is not None and self.dim is not None
        rank, parts, dim = self.group.rank(), self.parts, self.dim
        return torch.cat([b.chunk(parts, dim)[rank] for b in whole.chunk(self.blocks, dim)], dim)

    def joined(self, part: Tensor) -> Tensor:
        """The whole matrix, detached; a collective, so every rank must call.

        Args:
            part: What this rank holds.
        """
        part = part.detach()
        if self.parts == 1:
            return part
        assert self.dim is not None
        parts = [torch.empty_like(part) for _ in range(self.parts)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        blocks = zip(*(p.chunk(self.blocks, self.dim) for p in parts), strict=True)
        return torch.cat([piece for block in blocks for piece in block], self.dim)

    def first_rows(self, part: Tensor, count: int) -> Tensor:
        """The first rows of the whole matrix, at least `count` if it has so many; a collective.

        Args:
            part: What this rank holds.
            count: How many rows.
        """
        if self.dim == 0 and count > part.shape[0] // self.blocks:
            return self.joined(part)
        if self.dim == 1:
            return self.joined(part[:count])
        rows = part[:count].detach().clone()
        if self.parts > 1:
            dist.broadcast(rows, group_src=0, group=self.group)
        return rows
