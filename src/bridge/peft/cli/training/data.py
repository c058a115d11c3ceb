"""Read JSONL training data and turn it into token ids and labels, naming the line of every problem.

Three shapes of row are known: `{"text"}`, `{"prompt", "completion"}` and `{"messages"}`. Labels are
the token ids with -100 where no loss is taken: on prompts, and on what the assistant did not say
where the chat template can tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bridge.peft.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Shape = Literal["text", "prompt/completion", "messages"]
OnLong = Literal["error", "drop", "truncate"]
IGNORED = -100

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


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row in tokens; `labels` has -100 where no loss is taken. Both have the same length."""

    input_ids: list[int]
    labels: list[int]
    where: str


def read_jsonl(path: str | Path) -> list[Row]:
    """Read one JSON object a line; blank lines are skipped.

    Raises:
        AdapterError: no such file, not UTF-8, a line that is not a JSON object, or no rows at all.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"no data file {path}; pass a JSONL file with --data")
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


def tokenize(
    rows: Sequence[Row],
    shape: Shape,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
) -> list[Sample]:
    """Turn rows into samples, each closed with the end-of-sequence token where there is one.

    Args:
        rows: rows of one shape.
        shape: as `shape_of` tells it.
        tokenizer: the model's tokenizer.
        chat_template: for `messages`, a template with generation markers: loss on the assistant's
            words only. None renders the tokenizer's own and takes loss on all tokens.

    Raises:
        AdapterError: a row that cannot be rendered or has no token to learn, with the line.
    """
    encode: dict[Shape, Callable[[Row], Sample]] = {
        "text": lambda row: _text(row, tokenizer),
        "prompt/completion": lambda row: _completion(row, tokenizer),
        "messages": lambda row: _messages(row, tokenizer, chat_template),
    }
    samples = [encode[shape](row) for row in rows]
    for sample in samples:
        if not has_target(sample):
            raise AdapterError(f"{sample.where} has no token to learn; remove the line")
    return samples


def has_target(sample: Sample) -> bool:
    """Say whether any token is predicted: the first one never is."""
    return any(label != IGNORED for label in sample.labels[1:])


def fit_length(
    samples: list[Sample], max_length: int, on_long: OnLong
) -> tuple[list[Sample], str | None]:
    """Bring every sample to at most `max_length` tokens, never silently.

    Returns:
        The samples that remain, and a line that says what was done (None if nothing was).

    Raises:
        AdapterError: there are longer samples and `on_long` is "error", or none would be left.
    """
    too_long = [sample for sample in samples if len(sample.input_ids) > max_length]
    if not too_long:
        return samples, None
    longest = max(too_long, key=lambda sample: len(sample.input_ids))
    size = len(longest.input_ids)
    count = f"{len(too_long)} of {len(samples)} samples are longer than {max_length} tokens"
    if on_long == "error":
        raise AdapterError(
            f"{count}, the longest has {size} ({longest.where}); pass --max-length {size}, "
            "--on-long truncate or --on-long drop"
        )
    if on_long == "truncate":
        samples = [_cut(sample, max_length) for sample in samples]
    else:
        samples = [sample for sample in samples if len(sample.input_ids) <= max_length]
    kept = [sample for sample in samples if has_target(sample)]
    if not kept:
        raise AdapterError(f"{count} and none would be left; pass --max-length {size}")
    done = "cut" if on_long == "truncate" else "dropped"
    lost = len(samples) - len(kept)
    note = f"; {lost} of them lost every token to learn and were dropped" if lost else ""
    return kept, f"{count}, the longest has {size}: {done}{note}"


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
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
    complete = [shape for shape, names in _COLUMNS.items() if all(n in row.columns for n in names)]
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
                f'{row.where} has a {type(value).__name__} in "{name}"; write a string'
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


def _text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Sample:
    ids = _closed(tokenizer(row.columns["text"])["input_ids"], tokenizer)
    return Sample(input_ids=ids, labels=list(ids), where=row.where)


def _completion(row: Row, tokenizer: PreTrainedTokenizerBase) -> Sample:
    prompt, completion = row.columns["prompt"], row.columns["completion"]
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = _closed(tokenizer(prompt + completion)["input_ids"], tokenizer)
    # A token may join the end of the prompt to the start of the completion, and a tokenizer may
    # close the lone prompt: the completion starts where the two first differ.
    start = next(
        (i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b),
        min(len(prompt_ids), len(ids)),
    )
    return Sample(input_ids=ids, labels=[IGNORED] * start + ids[start:], where=row.where)


def _messages(row: Row, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Sample:
    try:
        rendered = tokenizer.apply_chat_template(
            row.columns["messages"],
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=template is not None,
        )
    except Exception as error:  # templates raise what they like
        raise AdapterError(
            f"{row.where} does not fit the chat template ({error}); mend the messages"
        ) from error
    ids = list(rendered["input_ids"])
    if template is None:
        return Sample(input_ids=ids, labels=list(ids), where=row.where)
    mask = rendered["assistant_masks"]
    labels = [token if said else IGNORED for token, said in zip(ids, mask, strict=True)]
    return Sample(input_ids=ids, labels=labels, where=row.where)


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End the ids with the end-of-sequence token, once, where the tokenizer has one."""
    end = tokenizer.eos_token_id
    return list(ids) if end is None or (ids and ids[-1] == end) else [*ids, end]


def _cut(sample: Sample, max_length: int) -> Sample:
    return replace(
        sample, input_ids=sample.input_ids[:max_length], labels=sample.labels[:max_length]
    )
