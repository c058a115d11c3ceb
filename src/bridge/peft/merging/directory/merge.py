"""Merge adapters into a model directory on disk, without loading the model."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from bridge.peft.dtypes import SAFETENSORS_NAMES, TRAINABLE_DTYPES, dtype_name
from bridge.peft.errors import AdapterError
from bridge.peft.formats.files.adapter_tensors import tensor_paths
from bridge.peft.formats.files.atomic import current_path, replace_file
from bridge.peft.formats.files.safetensors_file import FLOATING, Entry, read_header
from bridge.peft.formats.files.untrusted import CONFIG_NAME, reading
from bridge.peft.formats.model_directory import (
    Checkpoint,
    brought_tokenizer,
    check_no_adapter,
    copy_other_files,
    read_checkpoint,
    write_config,
    write_index,
)
from bridge.peft.formats.peft import AdapterFile, read_adapter
from bridge.peft.formats.peft.fingerprint import differences
from bridge.peft.merging.directory.base_copies import without_base_copies
from bridge.peft.merging.directory.edits import Edits, plan_edits
from bridge.peft.merging.directory.experts import experts_apart
from bridge.peft.merging.directory.quantised import trained_on
from bridge.peft.merging.directory.stream import Target, write_shard
from bridge.peft.merging.in_memory import check_compute_dtype
from bridge.peft.merging.report import MergeReport, MergeRow
from bridge.peft.model.walk import some_names
from bridge.peft.natural_order import natural_key
from bridge.peft.version import __version__

#: Called with the bytes written so far and the bytes to write.
Progress = Callable[[int, int], None]
_PART_SUFFIX = ".part"
#: In an unfinished output: which merge it is, and the report's rows of its finished files.
_JOB_NAME = ".merge.json"


def merge_directory(
    model: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float32,
    untie: bool = False,
    quantize: str | None = None,
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
        quantize: How the base was quantised when the adapters were trained, `"nf4"`, `"fp4"` or
            `"int8"`: the sum is of what its weights dequantise to, one tensor at a time in memory
            for each thread. `"none"` merges into the checkpoint's weights whatever it was.
        progress: Called with the bytes written so far and the bytes to write.

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
    _check_written_dtype(dtype)
    if not adapters:
        raise AdapterError("no adapter to merge; pass the directory of at least one")
    with reading(model):
        check_no_adapter(model)
        checkpoint = read_checkpoint(model)
    if os.path.lexists(output) and not _is_empty(output):
        raise AdapterError(f"{output} exists; pass a directory that does not")
    paths = [(Path(path), weight) for path, weight in adapters]
    loaded = [(read_adapter(path), weight) for path, weight in paths]
    with reading(model):
        loaded = [(without_base_copies(checkpoint, a), weight) for a, weight in loaded]
    loaded = [(experts_apart(checkpoint, a), weight) for a, weight in loaded]
    base = trained_on([adapter for adapter, _ in loaded], quantize)
    edits = plan_edits(checkpoint, loaded, base, untie=untie)
    with reading(model):
        tokenizer, notes = brought_tokenizer(model, [path for path, _ in paths])
    notes += [*base.notes, *_other_bases(checkpoint, edits, loaded), *_whole(edits)]
    notes += [*_untied(edits), *_dequantised(edits)]
    shards = {name: _lay_out(checkpoint, name, edits, dtype) for name in checkpoint.shards}
    part = output.with_name(output.name + _PART_SUFFIX)
    job = _identify(checkpoint, paths, (dtype, compute_dtype, untie, quantize))
    rows = _open_part(part, job, shards)
    try:
        _write_shards(checkpoint, shards, part, job, rows, compute_dtype, progress)
        copy_other_files(model, part, tokenizer)
        places = {t.entry.name: name for name, targets in shards.items() for t in targets}
        write_index(checkpoint, part, places, sum(map(_size, shards.values())))
        write_config(checkpoint, part, dtype, edits.vocabulary, heads_differ=edits.heads_differ)
        if output.exists():
            output.rmdir()
        os.rename(part, output)
        (output / _JOB_NAME).unlink()
    except AdapterError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    except OSError as error:
        raise _disk_error(error, part) from error
    merged = sorted((r for name in shards for r in rows[name]), key=lambda r: natural_key(r.fqn))
    return MergeReport(tuple(merged), tuple(notes))


def _check_written_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in TRAINABLE_DTYPES:
        names = ", ".join(map(dtype_name, TRAINABLE_DTYPES))
        raise AdapterError(f"a model is written in {names}; got {dtype}")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and next(path.iterdir(), None) is None


def _other_bases(
    checkpoint: Checkpoint, edits: Edits, adapters: Sequence[tuple[AdapterFile, float]]
) -> Iterator[str]:
    """Say for each adapter that was made on another base what differs, by its fingerprint."""
    modules: dict[str, nn.Module] = {}
    for name, shard in checkpoint.shards.items():
        # maps the file, so that only the values that are compared are ever read
        with safe_open(checkpoint.directory / name, "pt") as file:
            for entry in shard.entries:
                edit = edits.by_key.get(entry.name)
                # what was quantised is compared when it is quantised again
                if edit is not None and edit.quantised is None:
                    module = modules[edit.fqn] = nn.Module()
                    module.weight = nn.Parameter(file.get_tensor(entry.name), requires_grad=False)
    for adapter, _ in adapters:
        if found := differences(adapter.extra.get("base", {}), modules):
            more = f" ({len(found)} modules differ)" if len(found) > 1 else ""
            yield (
                f"the base model is not the one that the adapter was made on: {found[0]}{more}; "
                "results may differ from training"
            )


def _whole(edits: Edits) -> Iterator[str]:
    """Say which tensors the adapter replaces, with their shapes."""
    replaced = {e.fqn: e.replacement for e in edits.by_key.values() if e.replacement is not None}
    for edit in edits.by_key.values():
        if edit.rows is not None:
            yield f"{len(edit.rows[0])} rows of {edit.fqn} are the adapter's"
    if replaced:
        shown = [f"{fqn} ({'×'.join(map(str, t.shape))})" for fqn, t in sorted(replaced.items())]
        yield f"taken in full from the adapter: {some_names(shown)}"


def _untied(edits: Edits) -> Iterator[str]:
    """Say which tied tensors have values of their own now."""
    if edits.was_tied and edits.heads_differ:
        names = [f"{key} (was {source})" for key, source in edits.untied.items()]
        what = some_names(names) if names else "the output head"
        yield f"{what} is no longer tied; config.json says so too (tie_word_embeddings: false)"


def _dequantised(edits: Edits) -> Iterator[str]:
    """Say which linears are written dequantised though no branch is merged into them."""
    others = [e.fqn for e in edits.by_key.values() if e.quantised is not None and not e.terms]
    if others:
        told = "quantised in training and without a branch, written dequantised"
        yield f"{told}: {some_names(others)}"


def _lay_out(
    checkpoint: Checkpoint, name: str, edits: Edits, dtype: torch.dtype | None
) -> list[Target]:
    """What one file of the merged model holds, byte by byte; an untied tensor follows the rest."""
    entries = checkpoint.shards[name].entries
    wanted = [(entry, entry.name) for entry in entries]
    for key, source in edits.untied.items():
        wanted += [(entry, key) for entry in entries if entry.name == source]
    targets: list[Target] = []
    end = 0
    for source, key in wanted:
        kind, size, shape, edit = source.dtype, source.size, source.shape, edits.by_key.get(key)
        if edit is not None and edit.replacement is not None:
            shape = tuple(edit.replacement.shape)
            size = edit.replacement.numel() * FLOATING[kind].itemsize
        if dtype is not None and kind in FLOATING:
            size = size // FLOATING[kind].itemsize * dtype.itemsize
            kind = SAFETENSORS_NAMES[dtype]
        entry = Entry(key, kind, shape, end, end + size)
        targets.append(Target(entry, source, edit))
        end = entry.end
    return targets


def _size(targets: Sequence[Target]) -> int:
    return targets[-1].entry.end if targets else 0


def _identify(
    checkpoint: Checkpoint, adapters: Sequence[tuple[Path, float]], options: Sequence[object]
) -> str:
    """A hash of what the output depends on: files by size and time, options by value."""
    files = [checkpoint.directory / name for name in checkpoint.shards]
    for path, _ in adapters:
        files += [current_path(path, CONFIG_NAME), *tensor_paths(path)]
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    weights = [weight for _, weight in adapters]
    told = (__version__, checkpoint.config, checkpoint.shards, weights, options, stamps)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _open_part(
    part: Path, job: str, shards: Mapping[str, Sequence[Target]]
) -> dict[str, list[MergeRow]]:
    """The rows of the files that an interrupted merge of the same inputs finished in `part`.

    What another merge left there is removed.
    """
    try:
        known = json.loads((part / _JOB_NAME).read_bytes())
        if known["job"] == job:
            found = {n: [MergeRow(**row) for row in rows] for n, rows in known["rows"].items()}
            return {n: rows for n, rows in found.items() if _is_whole(part / n, shards[n])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # no such file, or one that is damaged: nothing is known to be done
    try:
        if part.is_dir() and not (part / _JOB_NAME).is_file() and any(part.iterdir()):
            raise AdapterError(f"{part} is in the way; delete it or pass another output directory")
        if os.path.lexists(part):
            shutil.rmtree(part)
        part.mkdir(parents=True)
        _record(part, job, {})
    except OSError as error:
        raise AdapterError(
            f"cannot write to {part.parent}: {error.strerror}; pass another output directory"
        ) from error
    return {}


def _is_whole(path: Path, targets: Sequence[Target]) -> bool:
    """Whether a file has its length, which a crash of the machine may have cut."""
    with open(path, "rb") as file:
        return read_header(path, file).entries == tuple(target.entry for target in targets)


def _record(part: Path, job: str, rows: Mapping[str, Sequence[MergeRow]]) -> None:
    as_dicts = {name: [asdict(row) for row in done] for name, done in rows.items()}
    replace_file(part / _JOB_NAME, json.dumps({"job": job, "rows": as_dicts}).encode())


def _write_shards(
    checkpoint: Checkpoint,
    shards: Mapping[str, Sequence[Target]],
    part: Path,
    job: str,
    rows: dict[str, list[MergeRow]],
    compute_dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    """Write the files that are not in `rows`; each gets its own name when it is finished."""
    done, total = sum(_size(shards[name]) for name in rows), sum(map(_size, shards.values()))
    _check_free_space(part, total - done)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for name in [name for name in shards if name not in rows]:
        staged = part / f"{name}{_PART_SUFFIX}"
        rows[name] = write_shard(
            checkpoint.directory / name,
            checkpoint.shards[name],
            staged,
            shards[name],
            compute_dtype=compute_dtype,
            progress=advance,
        )
        os.replace(staged, part / name)
        _record(part, job, rows)


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
