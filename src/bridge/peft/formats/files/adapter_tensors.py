"""The tensors of an adapter directory: one safetensors file, or several with or without index."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.files.atomic import current_path
from bridge.peft.formats.files.safetensors_file import read_tensors
from bridge.peft.formats.files.untrusted import TENSORS_NAME, checked_path, read_json

INDEX_NAME = f"{TENSORS_NAME}.index.json"
_SHARD = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.safetensors")


def tensor_paths(directory: Path) -> list[Path]:
    """The safetensors files of an adapter; its one file hides others.

    Args:
        directory: The adapter's directory.

    Raises:
        AdapterFileError: There is none, one is missing, or a link leads out of the directory.
    """
    names = [TENSORS_NAME]
    if directory.is_dir() and not os.path.lexists(current_path(directory, TENSORS_NAME)):
        names = _shard_names(directory) or names
    return [checked_path(directory, name) for name in names]


def read_adapter_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of an adapter directory by key, on the CPU.

    Args:
        directory: The adapter's directory.

    Raises:
        AdapterFileError: A file is missing or damaged, or two hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    for path in tensor_paths(directory):
        found = read_tensors(path)
        if twice := sorted(found.keys() & tensors.keys()):
            raise AdapterFileError(
                f"{directory} holds {twice[0]!r:.80} in two files; save the adapter again"
            )
        tensors |= found
    return tensors


def checked_index(path: Path) -> dict[str, Any]:
    """The decoded index of a model or an adapter in several files.

    Args:
        path: The index.

    Returns:
        The index; its `weight_map` gives the safetensors file beside it for each key.

    Raises:
        AdapterFileError: It is not one.
    """
    index = read_json(path)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise AdapterFileError(f"{path} has no weight_map; download it again")
    if not isinstance(index.get("metadata") or {}, dict):
        raise AdapterFileError(f"{path}: its metadata is not an object; download it again")
    for name in names.values():
        is_beside = isinstance(name, str) and Path(name).name == name
        if not is_beside or Path(name).suffix != ".safetensors":
            raise AdapterFileError(
                f"{path} names {name!r:.80}, which is not a safetensors file beside it; download "
                "it again"
            )
    return index


def _shard_names(directory: Path) -> list[str]:
    if os.path.lexists(directory / INDEX_NAME):
        index = checked_index(checked_path(directory, INDEX_NAME))
        return sorted(set(index["weight_map"].values()))
    found = [match for path in directory.iterdir() if (match := _SHARD.fullmatch(path.name))]
    if not found:
        return []
    last = max(int(match[2]) for match in found)
    if len(found) != last:
        raise AdapterFileError(
            f"{directory} holds {len(found)} of the {last} files of its adapter; download it again"
        )
    return sorted(match[0] for match in found)
