"""Merge adapters into a model directory on disk, without loading the model."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from bridge.peft.errors import AdapterError
from bridge.peft.formats.files.untrusted import reading
from bridge.peft.formats.peft import read_adapter
from bridge.peft.merging.directory.base_check import other_bases
from bridge.peft.merging.directory.checkpoint import (
    DTYPE_NAMES,
    FLOATING,
    Checkpoint,
    Entry,
    read_checkpoint,
)
from bridge.peft.merging.directory.edits import Edits, plan_edits
from bridge.peft.merging.directory.journal import JOURNAL_NAME, Journal, fingerprint
from bridge.peft.merging.directory.metadata import copy_other_files, write_config, write_index
from bridge.peft.merging.directory.stream import write_shard
from bridge.peft.merging.directory.worker import Target
from bridge.peft.merging.in_memory import check_compute_dtype
from bridge.peft.merging.report import MergeReport, MergeRow

#: Called with the bytes written so far and the bytes to write, from any thread.
Progress = Callable[[int, int], None]
_PART_SUFFIX = ".part"


def merge_directory(
    model: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float32,
    untie: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write `W + Σ weight · scale · B A` of a model directory, holding no tensor whole in memory.

    The sum is computed in `compute_dtype` and rounded once. Everything is written to
    `<output>.part`, which becomes `output` when it is complete; after an interruption the same call
    goes on where the last one stopped.

    Args:
        model: Directory of the base model, in safetensors.
        adapters: Directories of PEFT adapters, each with its weight in the sum.
        output: Directory to create.
        dtype: Dtype of the merged model; None keeps every tensor's own.
        compute_dtype: Dtype of the computation, float32 or float64.
        untie: Give an adapted head that is tied to the embedding a tensor of its own.
        progress: Called with the bytes written so far and the bytes to write, from any thread.

    Returns:
        A report with a row per merged tensor.

    Raises:
        AdapterError: Something is missing, damaged, does not fit or is not finite, the output
            exists, or the disk is full; there is no output then.

    Example:
        >>> print(merge_directory("llama", [("adapter", 1.0)], "merged"))
    """
    model, output = Path(model), Path(output)
    check_compute_dtype(compute_dtype)
    if dtype is not None and dtype not in DTYPE_NAMES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPE_NAMES)
        raise AdapterError(f"a model is written in {names}; got {dtype}")
    if not adapters:
        raise AdapterError("no adapter to merge; pass the directory of at least one")
    with reading(model):
        checkpoint = read_checkpoint(model)
    if os.path.lexists(output) and not _is_empty(output):
        raise AdapterError(f"{output} exists; pass a directory that does not")
    loaded = [(read_adapter(path), weight) for path, weight in adapters]
    edits = plan_edits(checkpoint, loaded, untie=untie)
    notes = tuple(other_bases(checkpoint, edits, loaded))
    shards = _lay_out(checkpoint, edits, dtype)
    paths = [(Path(path), weight) for path, weight in adapters]
    job = fingerprint(checkpoint, paths, (dtype, compute_dtype, untie))
    part = output.with_name(output.name + _PART_SUFFIX)
    journal = _open_part(part, job)
    try:
        rows = _write_shards(checkpoint, shards, journal, compute_dtype, progress)
        _write_rest(checkpoint, shards, part, dtype, edits)
        if output.exists():
            output.rmdir()
        os.rename(part, output)
    except AdapterError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    except OSError as error:
        raise _disk_error(error, part) from error
    return MergeReport(tuple(sorted(rows, key=_natural)), notes)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and next(path.iterdir(), None) is None


def _lay_out(
    checkpoint: Checkpoint, edits: Edits, dtype: torch.dtype | None
) -> dict[str, list[Target]]:
    """What each file of the merged model holds, byte by byte."""
    shards: dict[str, list[Target]] = {}
    for name, shard in checkpoint.shards.items():
        targets: list[Target] = []
        end = 0
        wanted = [(entry, entry.name) for entry in shard.entries]
        wanted += [
            (entry, key)
            for key, source in edits.untied.items()
            for entry in shard.entries
            if entry.name == source
        ]
        for source, key in wanted:
            kind = source.dtype
            if dtype is not None and kind in FLOATING:
                kind = DTYPE_NAMES[dtype]
            size = source.size
            if kind in FLOATING:
                size = size // FLOATING[source.dtype].itemsize * FLOATING[kind].itemsize
            entry = Entry(key, kind, source.shape, end, end + size)
            targets.append(Target(entry, source, shard, edits.by_key.get(key)))
            end = entry.end
        shards[name] = targets
    return shards


def _open_part(part: Path, job: str) -> Journal:
    """The directory to write to, with what an interrupted merge of the same inputs left there."""
    journal = Journal.open(part, job)
    try:
        if part.is_dir() and not journal.done:
            if next(part.iterdir(), None) is not None and not (part / JOURNAL_NAME).is_file():
                raise AdapterError(
                    f"{part} is in the way; delete it or pass another output directory"
                )
            shutil.rmtree(part)
        part.mkdir(parents=True, exist_ok=True)
        journal.save()
    except OSError as error:
        raise AdapterError(
            f"cannot write to {part.parent}: {error.strerror}; pass another output directory"
        ) from error
    return journal


def _write_shards(
    checkpoint: Checkpoint,
    shards: Mapping[str, Sequence[Target]],
    journal: Journal,
    dtype: torch.dtype,
    progress: Progress | None,
) -> list[MergeRow]:
    sizes = {name: sum(t.entry.size for t in targets) for name, targets in shards.items()}
    todo = [name for name in shards if journal.rows(name) is None]
    _check_free_space(journal.directory, sum(sizes[name] for name in todo))
    total, done = sum(sizes.values()), sum(sizes[name] for name in shards if name not in todo)
    lock = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)

    rows: list[MergeRow] = []
    for name, targets in shards.items():
        finished = journal.rows(name)
        if finished is None:
            staged = journal.directory / f"{name}{_PART_SUFFIX}"
            metadata = checkpoint.shards[name].metadata
            finished = write_shard(
                staged, targets, metadata=metadata, dtype=dtype, progress=advance
            )
            os.replace(staged, journal.directory / name)
            journal.record(name, finished)
        rows += finished
    return rows


def _write_rest(
    checkpoint: Checkpoint,
    shards: Mapping[str, Sequence[Target]],
    part: Path,
    dtype: torch.dtype | None,
    edits: Edits,
) -> None:
    """All but the weights; index and config last, then the journal is not needed any more."""
    copy_other_files(checkpoint.directory, part)
    if checkpoint.index is not None:
        places = {t.entry.name: name for name, targets in shards.items() for t in targets}
        total = sum(t.entry.size for targets in shards.values() for t in targets)
        write_index(checkpoint, part, places, total)
    write_config(checkpoint, part, dtype, heads_differ=edits.heads_differ)
    (part / JOURNAL_NAME).unlink()


def _check_free_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise AdapterError(
            f"the merged model needs {needed / 1e9:.2f} GB and the disk of {directory} has "
            f"{free / 1e9:.2f} GB free; free some or pass another output directory"
        )


def _disk_error(error: OSError, part: Path) -> AdapterError:
    for path in part.glob(f"*{_PART_SUFFIX}"):
        path.unlink(missing_ok=True)
    what = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or error
    return AdapterError(
        f"cannot write the merged model to {part}: {what}; the finished files stay there, and the "
        "same command goes on from them"
    )


def _natural(row: MergeRow) -> list[tuple[int, str]]:
    """Sort `layers.2` before `layers.10`."""
    parts = re.split(r"(\d+)", row.fqn)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
