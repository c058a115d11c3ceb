"""Seeded dropout whose mask is never stored: a hash of each element's place, made block by block.

    keep[i, j] = ((r[i] * m[j] + c[j]) xor q[i]) * n[j] >= threshold        (16-bit integers)

One seed gives the words r and q of the rows, c, m and n of the columns (n odd); four passes over a
block in cache make its mask, and backward makes the same mask again. All elements of one row, and
all of one column, are independent given ideal words, so any two elements are; rows meet like
independent draws because the multipliers are random (multiply-shift hashing: Dietzfelbinger,
"Universal hashing and k-wise independent random variables via integer arithmetic without primes",
1996). `docs/math.md` has the argument, `tests/test_ops_dropout.py` the statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bridge.peft.ops.scratch import scratch

_LANE = 2**16
_INTEGER_OF_SIZE = {4: torch.int32, 8: torch.int64}


#: Far apart and odd, so that the seeds of neighbouring shards share nothing.
_SHARDS_APART = 0x9E3779B97F4A7C15


def draw_seed(shard: int = 0) -> int:
    """Draw the seed of one call from torch's default generator.

    Drawn once per call, so ``torch.manual_seed`` and the generator state that activation
    checkpointing restores reproduce the mask.

    Args:
        shard: Which of several masks: ranks whose generators agree draw different masks for the
            parts of a sharded tensor, and leave their generators in agreement.
    """
    drawn = int(torch.randint(2**63 - 1, (1,)))
    return (drawn + shard * _SHARDS_APART) % (2**63 - 1)


class SeededMask:
    """The mask of one call: which elements of a (rows, columns) matrix are kept.

    Attributes:
        keep_probability: The exact probability with which an element is kept: ``1 - p`` rounded
            to a multiple of 2^-16.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        p: float,
        device: torch.device,
        seed: int | None,
        shard: int = 0,
    ) -> None:
        """Draw the words of a (rows, columns) mask with drop probability ``p``, from `draw_seed`.

        Without a seed they come from the default generator, and ``shard`` says which of several
        masks they make.
        """
        # only where there is one: the overload that takes it refuses sizes that are not known yet
        own: dict[str, Any] = {}
        if seed is not None and device.type != "meta":  # meta has no generator
            own = {"generator": torch.Generator(device).manual_seed(seed)}
        lanes = 2 * rows + 3 * columns
        words = torch.randint(-(2**63), 2**63 - 1, (-(-lanes // 4),), device=device, **own)
        if shard:
            words = words ^ (shard * _SHARDS_APART % 2**63)
        parts = words.view(torch.int16).split_with_sizes(
            [rows, rows, columns, columns, columns, -lanes % 4]
        )
        self._r, self._q = parts[0].unsqueeze(1), parts[1].unsqueeze(1)
        self._c, self._m, self._n = parts[2], parts[3], parts[4].bitwise_or_(1)
        dropped = min(max(round(p * _LANE), 1), _LANE - 1)
        self._threshold = dropped - _LANE // 2
        self.keep_probability = 1.0 - dropped / _LANE

    def of(self, rows: slice, block: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows of the mask, as wide as ``dtype``: ones where kept, else zeros.

        The result is scratch: valid until the next call, and free to be overwritten.
        """
        words = self._words(self._r[rows], self._q[rows], scratch("words", block, torch.int16))
        if dtype.itemsize == 2:
            return words
        return scratch("mask", block, _INTEGER_OF_SIZE[dtype.itemsize]).copy_(words)

    def whole(self) -> Tensor:
        """Return the whole mask: boolean, (rows, columns), True where an element is kept."""
        return self._words(self._r, self._q, None).bool()

    def _words(self, r: Tensor, q: Tensor, out: Tensor | None) -> Tensor:
        words = torch.addcmul(self._c, r, self._m, out=out)
        return words.bitwise_xor_(q).mul_(self._n).ge_(self._threshold)


def apply_(x: Tensor, mask: Tensor) -> Tensor:
    """Zero the dropped elements of ``x`` in place, without rescaling, and return it.

    A product of bit patterns with 0 or 1 is several times faster than a boolean mask.
    """
    x.view(mask.dtype).mul_(mask)
    return x


def consume_(mask: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` with its dropped elements 0, written over ``mask``."""
    return mask.mul_(x.view(mask.dtype)).view(x.dtype)
