"""Write one merged safetensors file block by block: no tensor is ever whole in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from bridge.peft.merging.directory.checkpoint import FLOATING, header_bytes
from bridge.peft.merging.directory.worker import Piece, Target, Worker, as_matrix
from bridge.peft.merging.report import MergeRow
from bridge.peft.merging.rounding import Rounding, row_blocks

_COPY_BYTES = 2**24
_MAX_WORKERS = 8


def write_shard(
    path: Path,
    targets: Sequence[Target],
    *,
    metadata: dict[str, str],
    dtype: torch.dtype,
    progress: Callable[[int], None],
) -> list[MergeRow]:
    """Write a safetensors file.

    Each of several threads reads a block, changes and writes it, so that the disk and the cores
    work at the same time; torch's own threads would leave the cores idle while a block is read.

    Args:
        path: The file, created or overwritten.
        targets: Its tensors, in the order of their bytes.
        metadata: Its `__metadata__`.
        dtype: Dtype of the computation.
        progress: Called with the number of bytes that were written, from any thread.

    Returns:
        A row for each merged tensor.

    Raises:
        AdapterError: A merged weight is not finite, or too large for its dtype.
    """
    header = header_bytes((t.entry for t in targets), metadata)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + (targets[-1].entry.end if targets else 0))
    work = _Work(targets, dtype, path, len(header), progress)
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, _MAX_WORKERS)) as pool:
            futures = [pool.submit(work.run) for _ in range(min(threads, _MAX_WORKERS))]
            try:
                for future in futures:
                    future.result()
            finally:
                work.stopped = True
    finally:
        torch.set_num_threads(threads)  # the workers set it to one for the process, too
    return work.report()


@dataclass
class _Work:
    """The pieces of one file, and what became of them."""

    targets: Sequence[Target]
    dtype: torch.dtype
    path: Path
    data_start: int
    progress: Callable[[int], None]
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    norms: dict[str, float] = field(default_factory=dict)
    results: list[tuple[str, int, Rounding]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pieces = self._cut()

    def run(self) -> None:
        """Do pieces until none is left; several threads run this at once."""
        torch.set_num_threads(1)
        with open(self.path, "r+b", buffering=0) as file, Worker(file, self.data_start) as worker:
            try:
                while not self.stopped:
                    with self.lock:
                        piece = next(self._pieces, None)
                    if piece is None:
                        return
                    rounding = worker.do(piece)
                    if rounding is not None:
                        self.results.append((piece.target.entry.name, piece.rows.start, rounding))
                    self.progress(piece.size)
            except BaseException:
                self.stopped = True
                raise

    def report(self) -> list[MergeRow]:
        """A row for each merged tensor."""
        totals: dict[str, Rounding] = {}
        for name, _, rounding in sorted(self.results, key=lambda result: result[:2]):
            totals[name] = totals.get(name, Rounding.none()) + rounding
        rows = []
        for target in self.targets:
            name = target.entry.name
            if target.edit is None or name not in self.norms:
                continue
            total, count = totals.get(name, Rounding.none()), prod(target.entry.shape)
            rows.append(MergeRow.of(target.edit.fqn, total, norm=self.norms[name], count=count))
        return rows

    def _cut(self) -> Iterator[Piece]:
        """Cut all tensors into pieces; an update's factors are made when its turn has come."""
        for target in self.targets:
            shape = as_matrix(target.entry.shape)
            if target.is_copy:
                size = target.source.size
                for start in range(0, size, _COPY_BYTES):
                    yield Piece(target, slice(start, min(start + _COPY_BYTES, size)))
                continue
            update = None
            if target.edit is not None and target.edit.replacement is None:
                update = target.edit.update(_compute_dtype(target, self.dtype))
                self.norms[target.entry.name] = update.norm()
            for rows in row_blocks(*shape):
                yield Piece(target, rows, update)


def _compute_dtype(target: Target, dtype: torch.dtype) -> torch.dtype:
    for entry in (target.entry, target.source):
        dtype = torch.promote_types(dtype, FLOATING[entry.dtype])
    return dtype
