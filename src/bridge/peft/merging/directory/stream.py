"""Write one merged safetensors file piece by piece: no tensor is ever whole in memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path

import torch
from torch import Tensor

from bridge.peft.errors import AdapterError
from bridge.peft.formats.files.safetensors_file import FLOATING, Entry, Header, header_bytes
from bridge.peft.merging.directory.edits import Edit
from bridge.peft.merging.report import MergeRow
from bridge.peft.merging.rounding import Rounding, Update, merge_rows, row_blocks
from bridge.peft.tensors import all_finite

#: Blocks of rows that a thread takes at a time.
_PIECE = 6
_MAX_WORKERS = 8
#: A piece: its bytes, and its rounding when it is written.
_Written = tuple[int, Future[Rounding]]


@dataclass(frozen=True)
class Target:
    """One tensor to write.

    Attributes:
        entry: Where it goes, and in which dtype.
        source: Where its base is in the base's file.
        edit: What changes it, if anything does.
    """

    entry: Entry
    source: Entry
    edit: Edit | None = None


def write_shard(
    source: Path,
    header: Header,
    path: Path,
    targets: Sequence[Target],
    *,
    compute_dtype: torch.dtype,
    progress: Callable[[int], None],
) -> list[MergeRow]:
    """Write the safetensors file `path` with `targets` in the order of their bytes.

    Each of several threads takes a piece, changes and writes it, so that the disk and the cores
    work at the same time; torch's own threads would leave the cores idle while one is read.

    Args:
        source: The base's file.
        header: What it holds.
        path: Created or overwritten.
        targets: Its tensors.
        compute_dtype: Dtype of the computation.
        progress: Called with the number of bytes that were written.

    Returns:
        A row for each merged tensor.

    Raises:
        AdapterError: A merged weight is not finite, or too large for its dtype.
    """
    start = header_bytes((target.entry for target in targets), header.metadata)
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(len(start) + (targets[-1].entry.end if targets else 0))
    files = _Files(source, header.data_start, path, len(start))
    rows: list[MergeRow] = []
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(threads, _MAX_WORKERS), "merge", torch.set_num_threads, (1,))
    torch.set_num_threads(1)  # small products: to share them out costs more than to compute them
    try:
        work: list[tuple[Target, Update | None, list[_Written]]] = []
        for target in targets:
            update = files.update(target, compute_dtype)
            cut = [(size, pool.submit(files.write, target, p, update)) for p, size in _cut(target)]
            work.append((target, update, cut))
        for target, update, written in work:
            rounding = Rounding()
            for size, future in written:
                rounding += future.result()
                progress(size)
            if target.edit is not None and update is not None:
                rows.append(MergeRow.of(target.edit.fqn, rounding, update))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return rows


def _is_copy(target: Target) -> bool:
    return target.edit is None and target.entry.dtype == target.source.dtype


def _row(target: Target, entry: Entry) -> tuple[torch.dtype, int, int]:
    """Dtype, columns and bytes of a row in one of the files; a copy's rows are its bytes."""
    if _is_copy(target):
        return torch.uint8, 1, 1
    dtype, columns = FLOATING[entry.dtype], prod(entry.shape[1:])
    return dtype, columns, max(1, columns) * dtype.itemsize


def _cut(target: Target) -> Iterator[tuple[slice, int]]:
    """Cut a tensor into pieces of whole rows, each with the bytes that it takes.

    One that was quantised is a single piece: its scales may be of all of it.
    """
    _, columns, size = _row(target, target.entry)
    if target.edit is not None and target.edit.quantised is not None:
        yield slice(0, target.entry.size // size), target.entry.size
        return
    for rows in row_blocks(target.entry.size // size, columns, together=_PIECE):
        yield rows, (rows.stop - rows.start) * size


@dataclass(frozen=True)
class _Files:
    """The base's file and the one to write, each with the start of its data."""

    base: Path
    base_start: int
    merged: Path
    merged_start: int

    def write(self, target: Target, piece: slice, update: Update | None) -> Rounding:
        """Write some rows of a tensor; the rounding, where they are merged."""
        dtype, columns, size = _row(target, target.entry)
        total, values = Rounding(), self._read(target, piece)
        buffer = bytearray()
        with open(self.merged, "r+b") as file:
            file.seek(self.merged_start + target.entry.start + piece.start * size)
            for block in row_blocks(len(values), columns):
                base = values[block]
                buffer = buffer or bytearray(base.numel() * dtype.itemsize)
                out = torch.frombuffer(buffer, dtype=dtype, count=base.numel()).view(base.shape)
                if _is_copy(target):
                    out.copy_(base)
                elif update is None:
                    _cast(target, base, out)
                else:
                    rows = slice(piece.start + block.start, piece.start + block.stop)
                    total += _merge(target, base, update, rows, out)
                file.write(memoryview(buffer)[: out.nbytes])
        return total

    def update(self, target: Target, dtype: torch.dtype) -> Update | None:
        """What is added to a tensor, if anything is; DoRA's norms take a pass over the base."""
        if target.edit is None or not target.edit.terms:
            return None
        for entry in (target.entry, target.source):
            dtype = torch.promote_types(dtype, FLOATING[entry.dtype])
        update = Update.of(target.edit.terms, dtype=dtype, transposed=target.edit.transposed)
        if target.edit.magnitude is None:
            return update
        blocks = ((rows, self._read(target, rows)) for rows, _ in _cut(target))
        return update.rescaled(target.edit.magnitude, blocks)

    def _read(self, target: Target, piece: slice) -> Tensor:
        """These rows of the base, or of what replaces it, with the new ones among them."""
        values = self._stored(target, piece)
        if target.edit is None or target.edit.rows is None:
            return values
        rows, tokens = target.edit.rows
        here = (tokens >= piece.start) & (tokens < piece.stop)
        # no row is rounded to less than what is written
        values = values.to(torch.promote_types(values.dtype, FLOATING[target.entry.dtype]))
        return values.index_copy(0, tokens[here] - piece.start, rows[here].to(values.dtype))

    def _stored(self, target: Target, piece: slice) -> Tensor:
        """These rows of the base, where the system has them in memory, or of what replaces it."""
        dtype, columns, size = _row(target, target.source)
        if target.edit is not None and target.edit.replacement is not None:
            return target.edit.replacement.reshape(-1, columns)[piece]
        start = self.base_start + target.source.start + piece.start * size
        before, length = start % mmap.ALLOCATIONGRANULARITY, (piece.stop - piece.start) * size
        with open(self.base, "rb") as file:
            # copy-on-write, because torch takes no memory that must not be written to
            mapped = mmap.mmap(
                file.fileno(), before + length, access=mmap.ACCESS_COPY, offset=start - before
            )
        count = length // dtype.itemsize
        values = torch.frombuffer(mapped, dtype=dtype, count=count, offset=before).view(-1, columns)
        if target.edit is None or (how := target.edit.quantised) is None:
            return values
        if target.edit.transposed:
            return how.dense(values.t().contiguous()).t().contiguous()
        return how.dense(values)


def _merge(target: Target, base: Tensor, update: Update, rows: slice, out: Tensor) -> Rounding:
    rounding = merge_rows(base, update, rows, out)
    if not isfinite(rounding.sum_error) and not all_finite(out):
        raise _not_finite(target, base)
    return rounding


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
