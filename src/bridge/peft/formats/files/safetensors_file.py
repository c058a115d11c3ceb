"""Safetensors files: headers of unknown origin read and checked, files of tensors written.

A file is `u64 header size, header (JSON), tensor bytes`. The header is checked against the size of
the file before any tensor is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import TensorSpec
from torch import Tensor

from bridge.peft.dtypes import SAFETENSORS_NAMES, dtype_name
from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.files.untrusted import no_duplicates
from bridge.peft.tensors import all_finite, is_plain

#: The floating dtypes by their names in a header.
FLOATING = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
#: What the safetensors library itself takes at most.
_MAX_HEADER_BYTES = 100_000_000
#: An adapter's header takes about 150 bytes per tensor; this is room for 200,000.
_MAX_ADAPTER_HEADER_BYTES = 32_000_000
_METADATA = "__metadata__"
_DEFAULT_METADATA = {"format": "pt"}
_MAX_SIZE = 2**40
_MAX_KEY_LENGTH = 2_000


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
class Header:
    """What a safetensors file says that it holds.

    Attributes:
        entries: Its tensors, in the order of their bytes.
        metadata: Its `__metadata__`.
        data_start: Where in the file the header ends.
    """

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path, file: BinaryIO, max_bytes: int = _MAX_HEADER_BYTES) -> Header:
    """Read the header of a safetensors file and check it against the file's size.

    Args:
        path: The file's name, for errors.
        file: The file, at its start.
        max_bytes: The longest header to read.

    Raises:
        AdapterFileError: It is not a sound safetensors file.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(max_bytes, size - 8):
        raise _damaged(path, f"its header claims {length:,} bytes and the file has {size:,}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=no_duplicates)
        metadata = _metadata(header.pop(_METADATA, {}))
        entries = sorted((_entry(*item) for item in header.items()), key=lambda e: (e.start, e.end))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from error
    end = 0
    for entry in entries:
        if entry.start != end:
            raise _damaged(path, f"{entry.name} starts at byte {entry.start}, not at {end}")
        end = entry.end
    if 8 + length + end != size:
        raise _damaged(path, f"its tensors end at byte {8 + length + end:,} of {size:,}")
    return Header(tuple(entries), metadata, 8 + length)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of an adapter's safetensors file, on the CPU.

    Args:
        path: A regular file.

    Returns:
        Tensors by key, in the file's order.

    Raises:
        AdapterFileError: Not a sound safetensors file, or a tensor is not floating or not finite.
    """
    try:
        with open(path, "rb") as file:
            entries = read_header(path, file, _MAX_ADAPTER_HEADER_BYTES).entries
            for entry in entries:
                if entry.dtype not in FLOATING:
                    raise AdapterFileError(
                        f"{path}: {entry.name} is {entry.dtype!r:.20}; an adapter's tensors are "
                        f"{', '.join(FLOATING)}"
                    )
            file.seek(0)
            content = file.read()
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "not enough memory"
        raise AdapterFileError(f"cannot read {path}: {reason}; copy it again") from error
    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:
        # whatever the library makes of bytes of unknown origin
        raise _damaged(path, str(error)) from error
    for key, tensor in tensors.items():
        if not all_finite(tensor):
            raise AdapterFileError(
                f"{path}: {key} holds NaN or inf; go back to an earlier checkpoint of the adapter"
            )
    # the library's own order changes from process to process
    return {entry.name: tensors[entry.name] for entry in entries}


def serialize(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file with `{"format": "pt"}` as its metadata.

    Args:
        tensors: By key; each gets bytes of its own, whatever it shares storage with.

    Raises:
        AdapterError: A tensor is not an ordinary one of a floating dtype, so the bytes at its
            address are not its values.
    """
    # Not by `safetensors.torch`, which needs numpy and refuses tensors that share storage.
    whole = {key: _ordinary(key, tensor) for key, tensor in tensors.items()}
    specs = {
        key: TensorSpec(
            dtype=dtype_name(tensor.dtype),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for key, tensor in whole.items()
    }
    return bytes(safetensors.serialize(specs, metadata=_DEFAULT_METADATA))


def header_bytes(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file whose tensors are written piece by piece.

    Args:
        entries: Its tensors.
        metadata: Its `__metadata__`; transformers asks for `{"format": "pt"}`.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata) or _DEFAULT_METADATA}
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
    raise ValueError(f"its metadata is {value!r:.80}, not an object of texts")


def _entry(name: str, value: dict[str, Any]) -> Entry:
    """One tensor, its key, dtype, shape and offsets checked against each other."""
    if not name.isprintable() or len(name) > _MAX_KEY_LENGTH:
        raise ValueError(f"it holds the key {name[:80]!r}")
    shape, (start, end), dtype = tuple(value["shape"]), value["data_offsets"], value["dtype"]
    if not all(type(n) is int and 0 <= n < _MAX_SIZE for n in (*shape, start, end)):
        raise ValueError(f"{name} has the shape {shape} and the offsets {start}, {end}")
    if not isinstance(dtype, str):
        raise ValueError(f"{name} has the dtype {dtype!r:.80}")
    itemsize = FLOATING[dtype].itemsize if dtype in FLOATING else None
    if end < start or (itemsize and end - start != prod(shape) * itemsize):
        raise ValueError(f"{name} has the offsets {start}, {end} for the shape {list(shape)}")
    return Entry(name, dtype, shape, start, end)


def _ordinary(key: str, tensor: Tensor) -> Tensor:
    """The tensor, contiguous and on the CPU."""
    tensor, strided = tensor.detach(), tensor.layout == torch.strided
    if not (is_plain(tensor) and strided and tensor.dtype in SAFETENSORS_NAMES):
        layout = "" if strided else f" in layout {tensor.layout}"
        raise AdapterError(
            f"cannot write {key}: it is a {type(tensor).__name__} of {tensor.dtype}{layout}; pass "
            f"an ordinary tensor of {', '.join(map(dtype_name, SAFETENSORS_NAMES))}"
        )
    return tensor.to("cpu").contiguous()


def _damaged(path: Path, what: str) -> AdapterFileError:
    text = "".join(c if c.isprintable() else " " for c in what)[:300]
    return AdapterFileError(f"{path} is damaged: {text}; download or save it again")
