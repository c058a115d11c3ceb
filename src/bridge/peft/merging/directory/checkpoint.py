"""A model directory as it lies on disk: its safetensors files and what each holds; no tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from bridge.peft.errors import AdapterError
from bridge.peft.formats.files.untrusted import no_duplicates

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
#: The floating dtypes that can be merged into and converted, by their safetensors name.
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in FLOATING.items()}
_MAX_HEADER_BYTES = 100_000_000
_PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file.

    Attributes:
        name: Its key.
        dtype: Its safetensors dtype.
        shape: Its shape.
        start: Its first byte, counted from the end of the header.
        end: The byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        path: The file.
        entries: Its tensors, in the order of their bytes.
        metadata: Its `__metadata__`.
        data_start: Where in the file the header ends.
    """

    path: Path
    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data_start: int


@dataclass(frozen=True)
class Checkpoint:
    """A model directory.

    Attributes:
        directory: Where it is.
        config: `config.json`, as decoded.
        shards: Its safetensors files by name.
        index: `model.safetensors.index.json`, as decoded, where there are several files.
    """

    directory: Path
    config: dict[str, Any]
    shards: Mapping[str, Shard]
    index: dict[str, Any] | None

    def entries(self) -> dict[str, Entry]:
        """All tensors by key."""
        return {entry.name: entry for shard in self.shards.values() for entry in shard.entries}


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read configuration, index and headers of a model directory.

    Args:
        directory: As `save_pretrained` writes it, with one or several safetensors files.

    Raises:
        AdapterError: No such directory, no safetensors in it, or something is damaged.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise AdapterError(f"{directory} {what}; pass the directory of a base model")
    if not (directory / CONFIG_NAME).is_file():
        raise AdapterError(
            f"{directory} holds no {CONFIG_NAME}; pass a model directory written by save_pretrained"
        )
    config = read_json(directory / CONFIG_NAME)
    index = None
    names = [SINGLE_NAME]
    if not (directory / SINGLE_NAME).is_file():
        index = _read_index(directory)
        names = sorted(set(index["weight_map"].values()))
    shards = {name: read_shard(directory / name) for name in names}
    checkpoint = Checkpoint(directory, config, shards, index)
    _check_index(checkpoint)
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """Decode a JSON file that holds an object.

    Args:
        path: The file.

    Raises:
        AdapterError: It holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is no valid JSON: {error}; download the model again") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def read_shard(path: Path) -> Shard:
    """Read the header of a safetensors file and check it against the file's size.

    Args:
        path: The file.

    Raises:
        AdapterError: It is damaged.
    """
    if not path.is_file():
        raise AdapterError(f"{path} is missing; download the model again")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged(path, f"its header claims {length:,} of {size:,} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=no_duplicates)
        metadata = _metadata(header.pop("__metadata__", {}))
        entries = sorted((_entry(*item) for item in header.items()), key=lambda e: (e.start, e.end))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from error
    end = 0
    for entry in entries:
        if entry.start != end or entry.end < entry.start:
            raise _damaged(path, f"{entry.name} starts at byte {entry.start}, not at {end}")
        if entry.dtype in FLOATING and entry.size != (
            prod(entry.shape) * FLOATING[entry.dtype].itemsize
        ):
            raise _damaged(path, f"{entry.name} has {entry.size} bytes for {list(entry.shape)}")
        end = entry.end
    if 8 + length + end != size:
        raise _damaged(path, f"its tensors end at byte {8 + length + end:,} of {size:,}")
    return Shard(path, tuple(entries), metadata, 8 + length)


def header_bytes(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file, up to the first tensor's bytes.

    Args:
        entries: Its tensors.
        metadata: Its `__metadata__`; transformers asks for `{"format": "pt"}`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata) or {"format": "pt"}}
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to eight bytes
    return len(text).to_bytes(8, "little") + text


def _metadata(value: Any) -> dict[str, str]:
    match value:
        case dict() if all(isinstance(text, str) for text in value.values()):
            return value
    raise ValueError(f"its metadata is {value!r:.80}, no object of texts")


def _entry(name: str, value: dict[str, Any]) -> Entry:
    start, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"{name} has the shape {shape} and offsets {start}, {end}")
    return Entry(name, str(value["dtype"]), shape, start, end)


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX_NAME
    if not path.is_file():
        if pickles := sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES):
            raise AdapterError(
                f"{directory} holds its weights as a pickle ({pickles[0]}), which can run any "
                "program when read; load it where you trust it and save it again with "
                "save_pretrained"
            )
        raise AdapterError(
            f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; pass the directory of a "
            "base model"
        )
    index = read_json(path)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise AdapterError(f"{path} has no weight_map; download the model again")
    if not isinstance(index.get("metadata") or {}, dict):
        raise AdapterError(f"{path} has a metadata that is no object; download the model again")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix in _PICKLES:
            raise AdapterError(f"{path} names {name!r}, which is no safetensors file beside it")
    return index


def _check_index(checkpoint: Checkpoint) -> None:
    seen: dict[str, str] = {}
    for name, shard in checkpoint.shards.items():
        for entry in shard.entries:
            if entry.name in seen:
                raise AdapterError(
                    f"{checkpoint.directory} holds {entry.name} twice, in {seen[entry.name]} and "
                    f"{name}; download the model again"
                )
            seen[entry.name] = name
    for key, name in (checkpoint.index or {}).get("weight_map", {}).items():
        if seen.get(key) != name:
            raise AdapterError(
                f"{checkpoint.directory / INDEX_NAME} places {key} in {name}, which does not hold "
                "it; download the model again"
            )


def _damaged(path: Path, what: str) -> AdapterError:
    return AdapterError(f"{path} is damaged: {what}; download the model again")
