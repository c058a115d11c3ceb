"""The files of an adapter directory of unknown origin: where they are, and the JSON in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.files.atomic import current_path

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
EXTRA_NAME = "bridge_adapter.json"
_MAX_JSON_BYTES = 16_000_000


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the context, what the system has against reading is an `AdapterFileError`.

    Args:
        path: What is read, or the directory of it.

    Raises:
        AdapterFileError: No permission, a name that is too long, a disk that fails.
    """
    try:
        yield
    except OSError as error:
        raise AdapterFileError(
            f"cannot read {error.filename or path}: {error.strerror or error}; pass a path that "
            "can be read"
        ) from error


def checked_path(directory: Path, name: str) -> Path:
    """The path of a file of an adapter, which must be inside its directory.

    Args:
        directory: The adapter's directory.
        name: The file's name.

    Raises:
        AdapterFileError: It is missing, or a link to somewhere else.
    """
    path = current_path(directory, name)
    if path.exists() and not path.is_file():
        raise AdapterFileError(f"{path} is not a regular file; save the adapter again")
    if not path.exists():
        pickle = directory / "adapter_model.bin"
        if name == TENSORS_NAME and pickle.exists():
            raise AdapterFileError(
                f"{pickle} is a pickle, which can run any program when read; ask for the adapter "
                "as safetensors, or convert it where it was trained"
            )
        raise AdapterFileError(f"{directory} holds no {name}; pass a PEFT adapter directory")
    resolved, home = path.resolve(), directory.resolve()
    # The cache of the Hugging Face Hub: snapshots/REVISION/FILE -> ../../blobs/HASH
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (resolved.is_relative_to(home) or resolved.is_relative_to(blobs)):
        raise AdapterFileError(
            f"{path} is a link out of its directory, to {str(resolved)!r}; copy the file there"
        )
    return path


def read_json(path: Path, *, infinity: bool = False) -> dict[str, Any]:
    """The object in a JSON file of unknown origin.

    Args:
        path: The file.
        infinity: Whether `Infinity` and `NaN` may be in it, as Python writes them.

    Raises:
        AdapterFileError: It is too large, not JSON, or not an object.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise AdapterFileError(
            f"cannot read {path}: {error.strerror or error}; copy it again"
        ) from error
    if len(content) > _MAX_JSON_BYTES:
        raise AdapterFileError(
            f"{path} is larger than {_MAX_JSON_BYTES:,} bytes; download or save it again"
        )
    try:
        constant = None if infinity else _no_constant
        value = json.loads(
            content.decode(), parse_constant=constant, object_pairs_hook=no_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{path} is not valid JSON ({error}); download or save it again"
        ) from error
    if not isinstance(value, dict):
        raise AdapterFileError(
            f"{path} must hold an object, got a {type(value).__name__}; download or save it again"
        )
    return value


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which every key is there once; for `json.loads`.

    Args:
        pairs: Its keys and values.

    Raises:
        ValueError: A key is there twice.
    """
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key[:80]!r}")
        result[key] = value
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def json_bytes(value: dict[str, Any]) -> bytes:
    """An object as an indented JSON file.

    Args:
        value: The object.
    """
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
