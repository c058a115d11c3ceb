"""Read JSONL training data, naming the line of every problem.

Three shapes of row are known: `{"text"}`, `{"prompt", "completion"}` and `{"messages"}`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bridge.peft.errors import AdapterError

Shape = Literal["text", "prompt/completion", "messages"]

_COLUMNS: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of data: its columns, and `file:line` (or another name) for messages about it."""

    columns: dict[str, Any]
    where: str


def read_jsonl(path: str | Path, flag: str = "--data") -> list[Row]:
    """Read one JSON object a line; blank lines are skipped.

    Args:
        path: the file.
        flag: where the path was given; only for the message.

    Raises:
        AdapterError: no such file, not UTF-8, a line that is not a JSON object, or no rows at all.
    """
    path = Path(path)
    if path.is_dir():
        raise AdapterError(f"{path} is a directory; pass a JSONL file with {flag}")
    if not path.is_file():
        raise AdapterError(f"no data file {path}; pass a JSONL file with {flag}")
    rows: list[Row] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                rows.append(Row(columns=_parse(line, where), where=where))
    if not rows:
        raise AdapterError(f"{path} holds no rows; write one JSON object a line")
    return rows


def rows_of(examples: Iterable[dict[str, Any]], name: str) -> list[Row]:
    """Name rows that come from no file."""
    return [Row(columns=dict(row), where=f"{name}:{i}") for i, row in enumerate(examples, start=1)]


def data_digest(rows: Sequence[Row]) -> str:
    """SHA-256 of what the rows say, whatever the file's blank lines and key order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.columns, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def shape_of(rows: Sequence[Row]) -> Shape:
    """Tell which of the three shapes the rows have; every row must have the same and be of text.

    Raises:
        AdapterError: unknown, missing, mixed, empty or wrongly typed columns, with the line.
    """
    first = _shape(rows[0])
    for row in rows:
        if (shape := _shape(row)) != first:
            raise AdapterError(
                f"{row.where} has {shape} columns but {rows[0].where} has {first}; "
                "split the file, one kind of row each"
            )
        _check_values(row, first)
    return first


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        # without the line's end, after which an error would be counted as in column 1
        value = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise AdapterError(
            f"{where} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise AdapterError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); "
            "write one JSON object a line"
        ) from None
    except RecursionError:
        raise AdapterError(f"{where} is nested too deeply; write one flat JSON object") from None
    if not isinstance(value, dict):
        raise AdapterError(
            f"{where} is a JSON {type(value).__name__}, not an object; write {{...}} on each line"
        )
    return value


def _shape(row: Row) -> Shape:
    complete: list[Shape] = [
        shape for shape, names in _COLUMNS.items() if all(n in row.columns for n in names)
    ]
    if len(complete) == 1:
        return complete[0]
    wanted = '"text", "prompt" and "completion", or "messages"'
    if complete:
        raise AdapterError(
            f"{row.where} has columns of {' and '.join(complete)}; keep only {wanted}"
        )
    got = ", ".join(repr(name) for name in row.columns) or "none"
    raise AdapterError(f"{row.where} has columns {got}; every row needs {wanted}")


def _check_values(row: Row, shape: Shape) -> None:
    for name in _COLUMNS[shape]:
        value = row.columns[name]
        if name == "messages":
            _check_messages(row.where, value)
        elif not isinstance(value, str):
            raise AdapterError(
                f'{row.where} has "{name}" of type {type(value).__name__}; write a string'
            )
        elif not value and name == "text":
            raise AdapterError(f'{row.where} has an empty "text"; remove the line')


def _check_messages(where: str, messages: Any) -> None:
    well_formed = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        )
    )
    if not well_formed:
        raise AdapterError(
            f'{where} has "messages" that are no list of {{"role": ..., "content": ...}} strings; '
            "write at least one such message"
        )
