"""Read training data from JSONL, JSON, CSV and Parquet files, naming the place of every problem."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from bridge.peft.errors import AdapterError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST_CELL = 2**31 - 1  # csv's own limit is 128 KB, which a document may exceed


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of data: its columns, and `file:line` (or another name) for messages about it."""

    columns: dict[str, Any]
    where: str


def read_rows(path: str | Path, *, evaluation: bool = False) -> list[Row]:
    """Read the rows of a file: JSONL, a JSON array of objects, CSV, TSV or Parquet.

    CSV, TSV and Parquet are known by their suffix, a JSON array by its first character.

    Args:
        path: the file.
        evaluation: whether it is the evaluation data; only for messages.

    Raises:
        AdapterError: no such file, not readable as what it is, or no rows at all.
    """
    path = Path(path)
    flag = "--eval-data" if evaluation else "--data"
    fix = f"pass a JSONL, JSON, CSV or Parquet file with {flag}"
    if path.is_dir():
        raise AdapterError(f"{path} is a directory; {fix}")
    if not path.is_file():
        raise AdapterError(f"no data file {path}; {fix}")
    name = f"evaluation data {path}" if evaluation else str(path)
    rows = list(_rows(path, name))
    if not rows:
        raise AdapterError(f"{name} holds no rows; write one JSON object a line")
    for row in rows:
        refuse_surrogates(row)
    return rows


def rows_of(examples: Iterable[dict[str, Any]], name: str) -> list[Row]:
    """Name rows that come from no file."""
    return [Row(columns=dict(row), where=f"{name}:{i}") for i, row in enumerate(examples, start=1)]


def data_digest(rows: Sequence[Row]) -> str:
    """SHA-256 of what the rows say, whatever the file's blank lines and key order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.columns, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def refuse_surrogates(row: Row) -> None:
    """Refuse half of a character, which JSON can spell and no tokenizer can read.

    Raises:
        AdapterError: a column holds one.
    """
    for key, value in row.columns.items():
        try:
            json.dumps([key, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise AdapterError(
                f"{row.where} has half of a surrogate pair, {half}, in {key!r}; "
                "write the whole character or remove it"
            ) from None


def _rows(path: Path, name: str) -> Iterator[Row]:
    if path.suffix.lower() == ".parquet":
        return _parquet(path, name)
    if delimiter := _DELIMITERS.get(path.suffix.lower()):
        return _csv(_decoded(path.read_bytes(), name), delimiter, name)
    with path.open("rb") as file:
        is_array = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return _json_array(_decoded(path.read_bytes(), name), name) if is_array else _jsonl(path, name)


def _jsonl(path: Path, name: str) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{name}:{number}"
                # without the line's end, after which an error would be counted as in column 1
                value = _parsed(_decoded(line, where).rstrip("\r\n"), where)
                yield Row(columns=_object(value, where), where=where)


def _json_array(text: str, name: str) -> Iterator[Row]:
    for number, value in enumerate(_parsed(text, name), start=1):
        where = f"{name}, row {number}"
        yield Row(columns=_object(value, where), where=where)


def _csv(text: str, delimiter: str, name: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1  # where the record begins; one with line breaks in its cells ends further down
    try:
        for cells in reader:
            where, line = f"{name}:{line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells, where)
            elif len(cells) != len(header):
                raise AdapterError(
                    f"{where} has {len(cells)} cells but the header has {len(header)}; "
                    "quote cells that hold the delimiter"
                )
            else:
                yield Row(columns=dict(zip(header, cells, strict=True)), where=where)
    except csv.Error as error:
        raise AdapterError(f"{name}:{line} is not CSV ({error}); close every quoted cell") from None


def _header(cells: list[str], where: str) -> list[str]:
    if twice := {name for name in cells if cells.count(name) > 1}:
        raise AdapterError(f"{where} names column {min(twice)!r} twice; rename one of them")
    return cells


def _parquet(path: Path, name: str) -> Iterator[Row]:
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        values = [value for batch in batches for value in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise AdapterError(f"{name} is not Parquet ({reason}); write the file anew") from None
    for number, value in enumerate(values, start=1):
        yield Row(columns=_without_nulls(value), where=f"{name}, row {number}")


def _without_nulls(value: Any) -> Any:
    """Drop keys without a value: Parquet gives every object the keys of all the others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data.count(b"\n", 0, error.start)
        place = f"{where}:{before + 1}" if b"\n" in data.rstrip(b"\r\n") else where
        raise AdapterError(
            f"{place} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if "\n" in text else where
        raise AdapterError(
            f"{place} is not JSON ({error.msg} at column {error.colno}); "
            "write one JSON object a line, or one array of objects"
        ) from None
    except RecursionError:
        raise AdapterError(f"{where} is nested too deeply; write one flat JSON object") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise AdapterError(
            f"{where} is a JSON {type(value).__name__}, not an object; write {{...}} for each row"
        )
    return value
