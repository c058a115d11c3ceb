"""`W + Σ scale · B A` in blocks of rows, rounded once, with the statistics of the rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bridge.peft import low_rank

#: One adapter's part of an update: A (dim, in_features), B (out_features, dim), and the scale.
Term = tuple[Tensor, Tensor, float]

#: Elements of a block: on a CPU the temporaries should stay in the cache.
_BLOCK = {"cpu": 2**20}
_BLOCK_ON_DEVICE = 2**25
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Update:
    """`Σ scale · B A` as one product of two thin factors, the way round the weight is stored.

    `left` is (rows, total rank), `right` (total rank, columns).
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(
        cls,
        terms: Iterable[Term],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        transposed: bool = False,
    ) -> Update:
        """Stack the factors of one or several adapters, to compute in `dtype` on `device`.

        `transposed`: the weight is stored as (in_features, out_features).
        """
        terms = [(a.detach(), b.detach(), scale) for a, b, scale in terms]
        b = torch.cat([b.to(device, dtype) * scale for _, b, scale in terms], dim=1)
        a = torch.cat([a.to(device, dtype) for a, _, _ in terms], dim=0)
        return cls(a.mT, b.mT) if transposed else cls(b, a)

    @cached_property
    def changing(self) -> Tensor:
        """How many weights of each row it is to change: none where a factor is all zero."""
        return self.left.ne(0).any(1) * self.right.ne(0).any(0).sum()

    def norm(self) -> float:
        """Its Frobenius norm."""
        return low_rank.norm(self.right, self.left)


class Scratch:
    """Buffers that are used again for every block, so that no block pays for fresh memory."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def like(self, slot: str, block: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous buffer of the shape and on the device of `block`, not initialised.

        Two slots never share memory.
        """
        key = (slot, dtype, block.device)
        flat = self._flat.get(key)
        if flat is None or flat.numel() < block.numel():
            flat = self._flat[key] = torch.empty(block.numel(), dtype=dtype, device=block.device)
        return flat[: block.numel()].view(block.shape)


@dataclass(frozen=True)
class Rounding:
    """What rounding did to some rows; 0-dim tensors, so that a GPU need not wait for the CPU.

    Attributes:
        max_error: Largest `|stored - exact|`.
        sum_error: Sum of it.
        changed: How many stored weights differ from the base's, rounded to the same dtype.
        meant: How many weights the update was to change.
        squares: Sum of the squared base weights.
        count: How many weights these are.
    """

    max_error: Tensor
    sum_error: Tensor
    changed: Tensor
    meant: Tensor
    squares: Tensor
    count: int

    @classmethod
    def none(cls, device: torch.device | str = "cpu") -> Rounding:
        """The rounding of no rows."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(zero, zero, zero.long(), zero.long(), zero, 0)

    @property
    def total(self) -> Tensor:
        """Finite unless a stored weight is not, or it overflows."""
        return self.sum_error

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            torch.maximum(self.max_error, other.max_error),
            self.sum_error + other.sum_error,
            self.changed + other.changed,
            self.meant + other.meant,
            self.squares + other.squares,
            self.count + other.count,
        )


def row_blocks(rows: int, columns: int, device: torch.device | str = "cpu") -> Iterator[slice]:
    """Cut a matrix into blocks of whole rows; a GPU takes larger ones."""
    elements = _BLOCK.get(torch.device(device).type, _BLOCK_ON_DEVICE)
    step = max(1, elements // max(columns, 1))
    for start in range(0, rows if columns else 0, step):
        yield slice(start, min(start + step, rows))


def merge_rows(
    weight: Tensor, update: Update, rows: slice, out: Tensor, scratch: Scratch
) -> Rounding:
    """Write some rows of `weight + update` into `out`, rounded once.

    Args:
        weight: (rows, columns): these rows of the base weight, of any floating dtype.
        update: The update of the whole weight; its dtype is that of the computation.
        rows: Which rows these are.
        out: (rows, columns); its dtype may differ from the weight's.
        scratch: Buffers to use.

    Returns:
        The statistics of these rows.
    """
    left = update.left[rows]
    exact = scratch.like("exact", weight, left.dtype).copy_(weight)
    squares = torch.linalg.vector_norm(exact).double().square()
    error = scratch.like("error", weight, left.dtype)
    if out.dtype.itemsize < left.dtype.itemsize:
        exact.addmm_(left, update.right)
        out.copy_(exact)
        error.copy_(out).sub_(exact)
    else:
        _add_exactly(exact, torch.mm(left, update.right, out=error), out)
    error.abs_()
    return Rounding(
        max_error=error.amax(),
        sum_error=error.sum(),
        changed=_count_changed(weight, out, scratch),
        meant=update.changing[rows].sum(),
        squares=squares,
        count=error.numel(),
    )


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no inf; forty times as fast as to look at each value."""
    # a sum with NaN or inf in it is never finite; one that overflows needs the closer look
    total = tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _count_changed(weight: Tensor, merged: Tensor, scratch: Scratch) -> Tensor:
    """How many weights differ from the base's; bits are compared, which is faster than numbers."""
    before = weight if weight.dtype == merged.dtype else weight.to(merged.dtype)
    integer = _INTEGERS[merged.dtype.itemsize]
    differing = scratch.like("differing", merged, integer)
    torch.ne(before.view(integer), merged.view(integer), out=differing)
    # counts along the shorter side of a block fit any integer, and no other is made for them
    return differing.sum(int(merged.shape[0] > merged.shape[1]), dtype=integer).sum()


def _add_exactly(base: Tensor, update: Tensor, out: Tensor) -> None:
    """Write `base + update` into `out`, and what rounding to its dtype took away into `update`.

    Where `out` is no narrower than the computation, the exact sum is not at hand to compare with,
    but its error is a float: Knuth's TwoSum (The Art of Computer Programming, vol. 2, 4.2.2).
    """
    total = base + update
    out.copy_(total)
    virtual = total - base
    update.sub_(virtual).add_(base - (total - virtual))
