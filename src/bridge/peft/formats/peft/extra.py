"""`bridge_adapter.json`: what a PEFT config has no field for; PEFT ignores the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from bridge.peft.branch.functions.starts import START_METHODS, is_start
from bridge.peft.branch.initializers import A_INITIALIZERS
from bridge.peft.branch.options import DropoutPosition, are_ranges
from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.files.atomic import current_path
from bridge.peft.formats.files.untrusted import EXTRA_NAME, checked_path, read_json
from bridge.peft.formats.peft.fields import is_dropout
from bridge.peft.formats.peft.fingerprint import check_stored
from bridge.peft.formats.peft.quantised_base import read_groups

_CHOICES = {
    "dropout_position": get_args(DropoutPosition),
    "lora_A_init_method": (*A_INITIALIZERS, *START_METHODS),
    "freeze_a": (False, True),
}
#: What holds for an adapter that PEFT made.
DEFAULTS: dict[str, Any] = {
    "dropout_position": "pre",
    "lora_A_init_method": "uniform",
    "freeze_a": False,
    "rows": None,
}


def read_extra(directory: Path) -> dict[str, Any]:
    """The decoded file; empty if there is none.

    Args:
        directory: The adapter's directory.

    Raises:
        AdapterFileError: It cannot be read, or does not hold a JSON object.
    """
    # a link to nothing or a directory in its place is an error, not a file that is not there
    if not os.path.lexists(current_path(directory, EXTRA_NAME)):
        return {}
    return read_json(checked_path(directory, EXTRA_NAME))


def check_extra(extra: Mapping[str, Any]) -> None:
    """Raise `AdapterFileError` unless the values have the right types.

    Args:
        extra: The decoded file; unknown fields are left alone.
    """
    _check_branch(extra, "")
    check_stored(extra.get("base", {}))
    read_groups(extra)
    _check_parameters(extra.get("parameters", {}))
    exceptions = extra.get("exceptions", {})
    if not isinstance(exceptions, dict):
        raise _wrong("exceptions", exceptions, "an object")
    for fqn, branch in exceptions.items():
        if not isinstance(branch, dict):
            raise _wrong(f"exceptions[{fqn[:80]!r}]", branch, "an object")
        _check_branch(branch, f"exceptions[{fqn[:80]!r}].")


def branch_settings(extra: Mapping[str, Any], fqn: str, dropout: float) -> dict[str, Any]:
    """`dropout`, `dropout_position`, `lora_A_init_method`, `freeze_a` and `rows` of one module.

    Args:
        extra: The decoded file, checked.
        fqn: The module's name.
        dropout: The dropout of the PEFT config.
    """
    settings: dict[str, Any] = DEFAULTS | {"dropout": dropout}
    for source in (extra, extra.get("exceptions", {}).get(fqn, {})):
        settings |= {name: source[name] for name in settings if name in source}
    if settings["rows"] is not None:
        settings["rows"] = tuple((start, stop) for start, stop in settings["rows"])
    return settings


def _check_parameters(modules: Any) -> None:
    """Raise unless this maps modules to the names of their adapted parameters, in order."""
    lists = modules.values() if isinstance(modules, dict) else [None]
    for names in lists:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _wrong("parameters", modules, "lists of names by module")


def _check_branch(branch: Mapping[str, Any], where: str) -> None:
    for name, choices in _CHOICES.items():
        value = branch.get(name, choices[0])
        if isinstance(value, str) and name == "lora_A_init_method" and is_start(value):
            continue
        if value not in choices:
            raise _wrong(where + name, value, " or ".join(repr(choice) for choice in choices))
    if (rows := branch.get("rows")) is not None and not are_ranges(rows):
        raise _wrong(f"{where}rows", rows, "(first, end) of rows of B in ascending order")
    if not is_dropout(p := branch.get("dropout", 0.0)):
        raise _wrong(f"{where}dropout", p, "a number in [0, 1)")


def _wrong(name: str, value: Any, wanted: str) -> AdapterFileError:
    return AdapterFileError(f"bridge_adapter.json: {name} must be {wanted}, got {value!r:.80}")
