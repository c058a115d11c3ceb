"""`W + Σ scale · B A` in blocks of rows, rounded once, with the statistics of the rounding.

With DoRA the rows of the sum are rescaled: `m / |W + scale · B A|` times them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bridge.peft import low_rank
from bridge.peft.ops.magnitude import factor_of, row_squares
from bridge.peft.tensors import all_finite

#: One adapter's part of an update: A (dim, in_features), B (out_features, dim), and the scale.
Term = tuple[Tensor, Tensor, float]

#: Elements of a block: on a CPU the temporaries should stay in the cache.
_BLOCK = {"cpu": 2**19}
_BLOCK_ON_DEVICE = 2**25
#: Of a weight with so many elements one stripe of this many in every eight is measured, in memory
#: and on disk alike: half a million weights tell shares and means to a tenth of a percent, and to
#: measure all of them takes longer than merging does.
_MEASURED_IN_PART, _STRIPE, _PART = 2**22, 2**20, 8
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Update:
    """`Σ scale · B A` as one product of two thin factors, the way round the weight is stored.

    Attributes:
        left: (rows, total rank).
        right: (total rank, columns).
        transposed: The weight is stored as (in_features, out_features).
        factor: What the sum is multiplied by, by DoRA: (rows, 1), or (1, columns) of a transposed
            weight; None for 1.
    """

    left: Tensor
    right: Tensor
    transposed: bool = False
    factor: Tensor | None = None

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
        return cls(a.mT, b.mT, transposed=True) if transposed else cls(b, a)

    def rescaled(self, magnitude: Tensor, weight: Iterable[tuple[slice, Tensor]]) -> Update:
        """The update that gives the rows of the sum (columns, if transposed) DoRA's magnitudes.

        Args:
            magnitude: m, (out_features,).
            weight: The whole base weight in blocks of rows, each with where it is.
        """
        dim = int(self.transposed)
        squares = self.left.new_zeros((self.left.shape[0], self.right.shape[1])[dim])
        for rows, block in weight:
            total = block.to(self.left.dtype, copy=True).addmm_(self.left[rows], self.right)
            if self.transposed:
                squares += total.square().sum(0)
            else:
                squares[rows] = row_squares(total)
        factor = factor_of(magnitude.to(squares.device), squares.sqrt())
        return replace(self, factor=factor.unsqueeze(1 - dim))

    def factor_of(self, rows: slice) -> Tensor | None:
        """The factor of some rows of the weight, as it is stored."""
        return self.factor if self.factor is None or self.transposed else self.factor[rows]

    @property
    def count(self) -> int:
        """How many weights the update is of."""
        return self.left.shape[0] * self.right.shape[1]

    def meant(self) -> int:
        """How many weights it is to change: none where the row or column of a factor is zero."""
        if self.factor is None:
            return int(self.left.any(1).sum()) * int(self.right.any(0).sum())
        out = self.right.mT if self.transposed else self.left
        return int((out.any(1) | (self.factor.flatten() != 1)).sum()) * self.count // len(out)

    def norm(self) -> float:
        """Its Frobenius norm."""
        return low_rank.norm(self.right, self.left)


@dataclass(frozen=True)
class Rounding:
    """What rounding did to the measured ones of some rows; of none, by default.

    Attributes:
        max_error: Largest `|stored - exact|`.
        sum_error: Sum of it; not finite if a stored weight of any row may not be.
        changed: How many stored weights differ from the base's, rounded to the same dtype.
        squares: Sum of the squared base weights.
        count: How many weights were measured.
        moved: Sum of the squared changes, where DoRA rescales; its update has no closed form.
    """

    max_error: float = 0.0
    sum_error: float = 0.0
    changed: int = 0
    squares: float = 0.0
    count: int = 0
    moved: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            max(self.max_error, other.max_error),
            self.sum_error + other.sum_error,
            self.changed + other.changed,
            self.squares + other.squares,
            self.count + other.count,
            self.moved + other.moved,
        )


def row_blocks(
    rows: int, columns: int, device: torch.device | str = "cpu", together: int = 1
) -> Iterator[slice]:
    """Cut a matrix into blocks of whole rows, or into pieces of several blocks `together`."""
    elements = _BLOCK.get(torch.device(device).type, _BLOCK_ON_DEVICE)
    # in a block of fewer rows than eight, or after such a one, a product may round differently
    step = together * max(8, elements // max(columns, 1) // 8 * 8)
    for start in range(0, rows if columns else 0, step):
        yield slice(start, min(start + step, rows))


def merge_rows(weight: Tensor, update: Update, rows: slice, out: Tensor) -> Rounding:
    """Write some rows of `weight + update` into `out`, rounded once.

    Args:
        weight: (rows, columns): these rows of the base weight, of any floating dtype.
        update: The update of the whole weight; its dtype is that of the computation.
        rows: Which rows these are.
        out: (rows, columns); its dtype may differ from the weight's.

    Returns:
        The statistics of these rows.
    """
    left = update.left[rows]
    exact = weight.to(left.dtype, copy=True)
    if (factor := update.factor_of(rows)) is not None:
        return _merge_rescaled(weight, exact.addmm_(left, update.right), update, rows, factor, out)
    if not _is_measured(rows, update):
        out.copy_(exact.addmm_(left, update.right))
        return Rounding(sum_error=0.0 if all_finite(out) else math.inf)
    norm = float(torch.linalg.vector_norm(exact))
    if out.dtype.itemsize < left.dtype.itemsize:
        exact.addmm_(left, update.right)
        out.copy_(exact)
        error = exact.sub_(out)
    else:
        error = _add_exactly(exact, left @ update.right, out)
    error.abs_()
    return Rounding(
        max_error=float(error.amax()),
        sum_error=float(error.sum()),
        changed=_count_changed(weight, out),
        squares=norm**2,
        count=error.numel(),
    )


def _merge_rescaled(
    weight: Tensor, total: Tensor, update: Update, rows: slice, factor: Tensor, out: Tensor
) -> Rounding:
    """Write `factor · total` into `out`; the error is that against the same product in float64."""
    out.copy_(total * factor)
    if not _is_measured(rows, update):
        return Rounding(sum_error=0.0 if all_finite(out) else math.inf)
    base = weight.double()
    exact = (base + (update.left[rows] @ update.right).double()).mul_(factor)
    error = (exact - out).abs_()
    return Rounding(
        max_error=float(error.amax()),
        sum_error=float(error.sum()),
        changed=_count_changed(weight, out),
        squares=float(base.square().sum()),
        count=error.numel(),
        moved=float(exact.sub_(base).square().sum()),
    )


def _is_measured(rows: slice, update: Update) -> bool:
    first = rows.start * update.right.shape[1] // _STRIPE
    return update.count < _MEASURED_IN_PART or first % _PART == 0


def _count_changed(weight: Tensor, merged: Tensor) -> int:
    """How many weights differ from the base's; bits are compared, which is faster than numbers."""
    before, integer = weight.to(merged.dtype), _INTEGERS[merged.dtype.itemsize]
    # in another dtype than this integer, the comparison takes four times as long
    differing = torch.empty_like(merged, dtype=integer)
    torch.ne(before.view(integer), merged.view(integer), out=differing)
    # counts along the shorter side of a block fit any integer, and no other is made for them
    return int(differing.sum(int(merged.shape[0] > merged.shape[1]), dtype=integer).sum())


def _add_exactly(base: Tensor, update: Tensor, out: Tensor) -> Tensor:
    """Write `base + update` into `out`; what rounding to its dtype took away.

    Where `out` is no narrower than the computation, the exact sum is not at hand to compare with,
    but its error is a float: Knuth's TwoSum (The Art of Computer Programming, vol. 2, 4.2.2).
    """
    total = base + update
    out.copy_(total)
    virtual = total - base
    return (base - (total - virtual)).add_(update.sub_(virtual))
