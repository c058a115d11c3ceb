"""Read, change and write some rows of one tensor: what a thread does at a time."""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Self

import torch
from torch import Tensor

from bridge.peft.errors import AdapterError
from bridge.peft.merging.directory.checkpoint import FLOATING, Entry, Shard
from bridge.peft.merging.directory.edits import Edit
from bridge.peft.merging.rounding import Rounding, Scratch, Update, all_finite, merge_rows

#: What the system answers where `copy_file_range` cannot copy between these two files.
_NO_KERNEL_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
#: Of a matrix with at least so many weights an eighth is measured, spread over all its blocks:
#: half a million weights tell shares and means to a tenth of a percent, and measuring all of them
#: takes as long as merging does.
_MEASURED_IN_PART = 2**22
_PART = 8
#: Most bytes in one write: larger ones make the system look for larger pages, which it is slower to
#: find than to fill (measured: 40 % more time for a merge on Linux 6.18, ext4, with 2 MB and more).
_WRITE_BYTES = 2**20


@dataclass(frozen=True)
class Target:
    """One tensor to write.

    Attributes:
        entry: Where it goes, and in which dtype.
        source: Where its base is.
        shard: The file that holds its base.
        edit: What changes it, if anything does.
    """

    entry: Entry
    source: Entry
    shard: Shard
    edit: Edit | None = None

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are those of the base."""
        return self.edit is None and self.entry.dtype == self.source.dtype


@dataclass(frozen=True)
class Piece:
    """Some consecutive elements of a tensor.

    Attributes:
        target: The tensor.
        rows: Which rows of it, as a matrix; of a copy which bytes.
        update: What to add to the whole tensor.
    """

    target: Target
    rows: slice
    update: Update | None = None

    @property
    def size(self) -> int:
        """How many bytes it writes."""
        start, end = self.span(self.target.entry)
        return end - start

    def span(self, entry: Entry) -> tuple[int, int]:
        """Its first byte in a file's data and the one after its last.

        Args:
            entry: The tensor's place in that file.
        """
        row = 1
        if not self.target.is_copy:
            row = as_matrix(entry.shape)[1] * FLOATING[entry.dtype].itemsize
        return entry.start + self.rows.start * row, entry.start + self.rows.stop * row


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A shape as rows and columns."""
    return (shape[0], shape[1]) if len(shape) == 2 else (prod(shape), 1)


class Worker:
    """One thread's files and buffers.

    Args:
        target: The file to write, unbuffered.
        data_start: Where its header ends.
    """

    def __init__(self, target: BinaryIO, data_start: int) -> None:
        self._target, self._data_start = target, data_start
        self._sources: dict[Path, tuple[BinaryIO, mmap.mmap]] = {}
        self._scratch = Scratch()
        self._out = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for file, _ in self._sources.values():
            file.close()  # the mapping goes with the last tensor that looks into it

    def do(self, piece: Piece) -> Rounding | None:
        """Write a piece.

        Args:
            piece: What to write.

        Returns:
            The rounding, of a merged piece.

        Raises:
            AdapterError: A merged weight is not finite, or a value too large for its dtype.
        """
        target = piece.target
        if target.is_copy:
            self._copy(piece)
            return None
        out, rounding = self._buffer(target.entry, piece.rows), None
        if piece.update is not None:
            base, part = self._read(piece), _measured_part(target.entry)
            rounding = merge_rows(base, piece.update, piece.rows, out, self._scratch, part=part)
            if not bool(rounding.total.isfinite()) and not all_finite(out):
                raise _not_finite(target, base)
        elif target.edit is not None and target.edit.replacement is not None:
            values = target.edit.replacement.reshape(as_matrix(target.entry.shape))
            _cast(target, values[piece.rows], out)
        else:
            _cast(target, self._read(piece), out)
        self._target.seek(self._data_start + piece.span(target.entry)[0])
        _write_exactly(self._target, memoryview(self._out)[: piece.size])
        self._forget(piece)
        return rounding

    def _buffer(self, entry: Entry, rows: slice) -> Tensor:
        """Some rows of a tensor to fill, in memory that is used again."""
        dtype, columns = FLOATING[entry.dtype], as_matrix(entry.shape)[1]
        count = (rows.stop - rows.start) * columns
        if len(self._out) < count * dtype.itemsize:
            self._out = bytearray(count * dtype.itemsize)
        return torch.frombuffer(self._out, dtype=dtype, count=count).view(-1, columns)

    def _source(self, shard: Shard) -> tuple[BinaryIO, mmap.mmap]:
        if shard.path not in self._sources:
            file = open(shard.path, "rb", buffering=0)
            # copy-on-write, because torch takes no memory that must not be written to
            self._sources[shard.path] = file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._sources[shard.path]

    def _read(self, piece: Piece) -> Tensor:
        """Some rows of the base, where the system has them in memory."""
        shard, entry = piece.target.shard, piece.target.source
        columns = as_matrix(entry.shape)[1]
        count = (piece.rows.stop - piece.rows.start) * columns
        offset = shard.data_start + piece.span(entry)[0]
        mapped = self._source(shard)[1]
        values = torch.frombuffer(mapped, dtype=FLOATING[entry.dtype], count=count, offset=offset)
        return values.view(-1, columns)

    def _forget(self, piece: Piece) -> None:
        """Take what was read out of this process's memory; the system may keep it."""
        source = self._sources.get(piece.target.shard.path)
        if source is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start, end = (piece.target.shard.data_start + n for n in piece.span(piece.target.source))
        start -= start % mmap.PAGESIZE
        source[1].madvise(mmap.MADV_DONTNEED, start, end - start)

    def _copy(self, piece: Piece) -> None:
        target, shard = piece.target, piece.target.shard
        source = self._source(shard)[0]
        start = shard.data_start + piece.span(target.source)[0]
        to = self._data_start + piece.span(target.entry)[0]
        left = piece.size
        while left and (done := _copy_in_kernel(source, self._target, start, to, left)):
            start, to, left = start + done, to + done, left - done
        if left:
            buffer = memoryview(bytearray(left))
            source.seek(start)
            _read_exactly(source, buffer, shard.path)
            self._target.seek(to)
            _write_exactly(self._target, buffer)


def _measured_part(entry: Entry) -> int:
    return _PART if prod(entry.shape) >= _MEASURED_IN_PART else 1


def _copy_in_kernel(source: BinaryIO, target: BinaryIO, start: int, to: int, count: int) -> int:
    """Copy without a detour through our memory; 0 where the system cannot."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), count, start, to)
    except OSError as error:
        if error.errno in _NO_KERNEL_COPY:
            return 0
        raise


def _read_exactly(file: BinaryIO, buffer: memoryview, path: Path) -> None:
    done = 0
    while done < len(buffer):
        count: int = file.readinto(buffer[done:])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise AdapterError(f"{path} was cut short while it was read; merge again")
        done += count


def _write_exactly(file: BinaryIO, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        done += file.write(buffer[done : done + _WRITE_BYTES])


def _cast(target: Target, values: Tensor, out: Tensor) -> None:
    """Write `values` in another dtype; `AdapterError` where one becomes infinite by it."""
    out.copy_(values)
    narrower = torch.finfo(out.dtype).max < torch.finfo(values.dtype).max
    if narrower and bool((out.isinf() & ~values.isinf()).any()):
        raise AdapterError(
            f"{target.entry.name} holds values too large for {out.dtype}; pass --dtype "
            "bfloat16 or float32"
        )


def _not_finite(target: Target, base: Tensor) -> AdapterError:
    name = target.entry.name
    if not all_finite(base):
        return AdapterError(f"{name} holds NaN or inf in the base model; nothing was merged")
    return AdapterError(
        f"the merged {name} overflows {FLOATING[target.entry.dtype]}; pass --dtype bfloat16 or "
        "float32"
    )
