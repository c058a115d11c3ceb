"""Seeded dropout whose mask is never stored: a hash of each element's place.

    keep[i, j] = ((rows[i] xor columns[j]) * multipliers[j]) >= threshold     (32-bit integers)

One seed gives three small tables, three passes over a block in cache make its mask, and backward
makes the same mask again. Given the columns' words, the elements of a column are as
independent as the words of ``rows``; given the rows' words, the elements of a row are as
independent as the words of ``columns``; and two rows meet in a column like two draws, because the
multiplier of a column is a random odd number (Dietzfelbinger's multiply-shift hashing, 1996).
`docs/math.md` has the argument, `tests/test_ops_dropout.py` the statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = 2**32
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def draw_seed() -> int:
    """Draw the seed of one call from torch's default generator.

    Drawn once per call, so ``torch.manual_seed`` and the generator state that activation
    checkpointing restores reproduce the mask.
    """
    return int(torch.randint(2**63 - 1, (1,)))


class SeededMask:
    """The mask of one call: which elements of a (rows, columns) matrix are kept.

    Attributes:
        keep_probability: The exact probability with which an element is kept: ``1 - p``
            rounded to a multiple of 2^-32.
    """

    def __init__(
        self, rows: int, columns: int, p: float, device: torch.device, seed: int | None
    ) -> None:
        """Draw the tables of a (rows, columns) mask with drop probability ``p``.

        Args:
            rows: Rows of the matrix.
            columns: Columns of the matrix.
            p: Probability in (0, 1) with which an element is dropped.
            device: Where the matrix is.
            seed: From `draw_seed`; None to draw the tables from the default generator.
        """
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        shape = (rows + 2 * columns,)
        words = torch.randint(
            -(2**31), 2**31, shape, dtype=torch.int32, device=device, generator=generator
        )
        self._rows = words[:rows].unsqueeze(1)
        self._columns = words[rows : rows + columns]
        self._multipliers = words[rows + columns :] | 1
        dropped = min(max(round(p * _WORDS), 1), _WORDS - 1)
        self._threshold = dropped - _WORDS // 2
        self.keep_probability = 1.0 - dropped / _WORDS

    def block(self, rows: slice, scratch: Tensor | None = None) -> Tensor:
        """Return the mask of some rows: int32 ones where kept, zeros where dropped.

        Args:
            rows: Which rows of the matrix.
            scratch: Where to write, (at least len(rows), columns) int32; None to allocate.
        """
        table = self._rows[rows]
        out = None if scratch is None else scratch[: table.shape[0]]
        words = torch.bitwise_xor(table, self._columns, out=out)
        return words.mul_(self._multipliers).ge_(self._threshold)


def as_wide_as(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``mask`` in integers as wide as ``dtype``, for `apply_` and `consume_`."""
    return mask.to(_INTEGER_OF_SIZE[dtype.itemsize])


def apply_(x: Tensor, mask: Tensor) -> Tensor:
    """Zero the dropped elements of ``x`` in place, without rescaling, and return it.

    A product of bit patterns with 0 or 1 is several times faster than a boolean mask.
    """
    x.view(mask.dtype).mul_(mask)
    return x


def consume_(mask: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` with its dropped elements 0, written over ``mask``."""
    return mask.mul_(x.view(mask.dtype)).view(x.dtype)
