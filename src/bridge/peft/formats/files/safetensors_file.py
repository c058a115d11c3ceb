"""Read and write safetensors files of unknown origin; nothing else is ever read.

A file is `u64 header size, header (JSON), tensor bytes`. The header is checked against the size of
the file before any tensor is read.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.files.untrusted import no_duplicates

#: An adapter's header takes about 150 bytes per tensor; this is room for 200,000.
MAX_HEADER_BYTES = 32_000_000
_METADATA = "__metadata__"
_MAX_SIZE = 2**40
_MAX_KEY_LENGTH = 2_000
#: The dtypes a LoRA matrix or a saved module may have, by their safetensors name.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, on the CPU.

    Args:
        path: A regular file.

    Returns:
        Tensors by key, in the file's order.

    Raises:
        AdapterFileError: Not a sound safetensors file, or a tensor is not floating or not finite.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(path, file, size)
            _check_header(path, header, size)
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
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(
                f"{path}: {key} holds NaN or inf; go back to an earlier checkpoint of the adapter"
            )
    # the library's own order changes from process to process
    return {key: tensors[key] for key in header if key != _METADATA}


def serialize(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file with `{"format": "pt"}` as its metadata.

    Args:
        tensors: By key; each gets bytes of its own, whatever it shares storage with.
    """
    # Not by safetensors' own function, which needs numpy, and nothing else here does.
    own = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    data: list[bytes] = []
    offset = 0
    # wide elements first keeps every tensor aligned
    for key in sorted(own, key=lambda key: (-own[key].element_size(), key)):
        tensor = own[key]
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        data.append(ctypes.string_at(tensor.data_ptr(), end - offset))
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *data))


def _read_header(path: Path, file: Any, size: int) -> dict[str, Any]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise _damaged(path, f"it has {size} bytes")
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise _damaged(path, f"its header claims {length:,} bytes and the file has {size:,}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a {type(header).__name__}")
    return header


def _check_header(path: Path, header: dict[str, Any], size: int) -> None:
    """Check names, dtypes, shapes and offsets against each other and the size of the file."""
    for key, entry in header.items():
        if key == _METADATA:
            continue
        if not key.isprintable() or len(key) > _MAX_KEY_LENGTH:
            raise _damaged(path, f"it holds the key {key[:80]!r}")
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
                pass
            case _:
                raise _damaged(path, f"the entry of {key!r} has no dtype, shape and offsets")
        if dtype not in _DTYPES:
            raise AdapterFileError(
                f"{path}: {key} is {dtype!r:.20}; an adapter's tensors are {', '.join(_DTYPES)}"
            )
        if not all(type(n) is int and 0 <= n < _MAX_SIZE for n in shape):
            raise _damaged(path, f"{key} has the shape {shape}")
        if not 0 <= start <= end <= size or end - start != prod(shape) * _DTYPES[dtype].itemsize:
            raise _damaged(path, f"{key} has the offsets {start}, {end} for the shape {shape}")


def _damaged(path: Path, what: str) -> AdapterFileError:
    text = "".join(c if c.isprintable() else " " for c in what)[:300]
    return AdapterFileError(f"{path} is damaged: {text}; download or save the adapter again")
