"""Recognise the layout of data and bring its rows to one of three shapes.

The shapes are `{"text"}`, `{"prompt", "completion"}` and `{"messages"}`, the last with `"tools"`
where there are any. Alpaca's and ShareGPT's rows become messages, and so do rows with a `system`
column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from bridge.peft.errors import AdapterError
from bridge.peft.finetune.data import Row, refuse_surrogates
from bridge.peft.finetune.messages import Messages, checked_messages

Shape = Literal["text", "prompt/completion", "messages"]

_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """Rows of one shape, and lines that say how they were read."""

    shape: Shape
    rows: list[Row]
    notes: list[str]


def recognise(rows: Sequence[Row], *, name: str = "data", has_chat_template: bool) -> Recognised:
    """Tell the layout of the rows, which all must share, and bring them to one shape.

    Args:
        rows: as read; at least one.
        name: what the data is called in the notes.
        has_chat_template: whether messages can be rendered. Without, instructions become prompts.

    Raises:
        AdapterError: unknown, missing, mixed, empty or wrongly typed columns, with the place.
    """
    layout = _layout(rows[0])
    for row in rows:
        if (other := _layout(row)) is not layout:
            raise AdapterError(
                f"{row.where} has {other.name} columns but {rows[0].where} has {layout.name}; "
                "split the file, one kind of row each"
            )
    has_system = any(row.columns.get("system") for row in rows)
    shape, read = layout.plain_shape, layout.plain
    if read is None or (
        has_chat_template and (layout is _ALPACA or (layout is _PAIRS and has_system))
    ):
        shape, read = "messages", partial(_as_messages, layout=layout)
    how = "" if layout.name == shape else f", read as {shape}"
    if layout is _ALPACA and shape != "messages":
        how += " with a blank line after the instruction and after the input"
    count = "1 row" if len(rows) == 1 else f"{len(rows):,} rows"
    notes = [f"{name}: {count} of {layout.name}{how}"]
    known = {*layout.needs, *layout.may_have}
    if unread := dict.fromkeys(key for row in rows for key in row.columns if key not in known):
        notes.append(f"{name}: columns not read: {named(unread)}")
    read_rows = [Row(columns=read(row), where=row.where) for row in rows]
    return Recognised(shape=shape, rows=read_rows, notes=notes)


def named(names: Iterable[object]) -> str:
    """List at most five names, and how many more there are."""
    shown = [repr(name) for name in names]
    more = len(shown) - _MOST_NAMED
    return ", ".join(shown[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layout:
    """Which columns rows have, and how they are read: as messages, or plainly, or either."""

    name: str
    needs: tuple[str, ...]
    may_have: tuple[str, ...] = ()
    messages: Callable[[Row], Messages] | None = None
    plain: Callable[[Row], dict[str, str]] | None = None
    plain_shape: Shape = "prompt/completion"


def _layout(row: Row) -> _Layout:
    columns = row.columns
    complete = [
        layout for layout in _LAYOUTS if all(columns.get(key) is not None for key in layout.needs)
    ]
    if complete == [_ALPACA, _TEXT]:  # the original's "text" is the row once more
        return _ALPACA
    if complete == [_PAIRS] and isinstance(columns["prompt"], list):
        return _CHAT_PAIRS
    if len(complete) == 1:
        return complete[0]
    if complete:
        names = " and of ".join(layout.name for layout in complete)
        raise AdapterError(f"{row.where} has columns of {names}; keep those of one of them")
    got = named(key for key, value in columns.items() if value is not None) or "none"
    if empty := [key for key, value in columns.items() if value is None]:
        got += f" (null: {named(empty)})"
    raise AdapterError(
        f'{row.where} has columns {got}; every row needs "text", "prompt" and "completion", '
        '"messages", "conversations", or "instruction" and "output"'
    )


def _text(row: Row) -> dict[str, str]:
    if not (text := _string(row, "text")):
        raise AdapterError(f'{row.where} has an empty "text"; remove the line')
    return {"text": text}


def _pair(row: Row) -> dict[str, str]:
    return _without_system(row, _string(row, "prompt"), _string(row, "completion"))


def _instruction_as_pair(row: Row) -> dict[str, str]:
    return _without_system(row, f"{_instruction(row)}\n\n", _string(row, "output"))


def _without_system(row: Row, prompt: str, completion: str) -> dict[str, str]:
    if row.columns.get("system"):
        raise AdapterError(
            f'{row.where} has a "system" message but the tokenizer has no chat template to put it '
            "in; write it into the text before the answer"
        )
    return {"prompt": prompt, "completion": completion}


def _chat_pair(row: Row) -> Messages:
    context = checked_messages(row, "prompt")
    said_before = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in context]
    return said_before + checked_messages(row, "completion")


def _exchange(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _instruction(row: Row) -> str:
    instruction = _string(row, "instruction")
    given = _string(row, "input") if row.columns.get("input") is not None else ""
    return f"{instruction}\n\n{given}" if given.strip() else instruction


_TEXT = _Layout(name="text", needs=("text",), plain=_text, plain_shape="text")
_PAIRS = _Layout(
    name="prompt/completion",
    needs=("prompt", "completion"),
    may_have=("system",),
    messages=lambda row: _exchange(_string(row, "prompt"), _string(row, "completion")),
    plain=_pair,
)
_CHAT_PAIRS = _Layout(
    name="prompts and completions of messages",
    needs=("prompt", "completion"),
    may_have=("system", "tools"),
    messages=_chat_pair,
)
_ALPACA = _Layout(
    name="Alpaca instructions",
    needs=("instruction", "output"),
    may_have=("input", "system"),
    messages=lambda row: _exchange(_instruction(row), _string(row, "output")),
    plain=_instruction_as_pair,
)
_LAYOUTS = [
    _Layout(
        name="messages",
        needs=("messages",),
        may_have=("system", "tools"),
        messages=lambda row: checked_messages(row, "messages"),
    ),
    _Layout(
        name="ShareGPT conversations",
        needs=("conversations",),
        may_have=("system", "tools"),
        messages=lambda row: checked_messages(row, "conversations"),
    ),
    _PAIRS,
    _ALPACA,
    _TEXT,
]


def _as_messages(row: Row, layout: _Layout) -> dict[str, Any]:
    assert layout.messages is not None
    messages = layout.messages(row)
    if row.columns.get("system"):
        if messages[0]["role"] == "system":
            raise AdapterError(
                f'{row.where} has a "system" column and a first message of role "system"; keep one'
            )
        messages = [{"role": "system", "content": _string(row, "system")}, *messages]
    tools = _tools(row) if "tools" in layout.may_have else []
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _string(row: Row, key: str) -> str:
    value = row.columns[key]
    if not isinstance(value, str):
        raise AdapterError(
            f'{row.where} has "{key}" of type {type(value).__name__}; write a string'
        )
    return value


def _tools(row: Row) -> list[dict[str, Any]]:
    tools = row.columns.get("tools")
    if isinstance(tools, str):  # many published data sets hold them as JSON in a string
        try:
            tools = json.loads(tools or "[]")
        except json.JSONDecodeError as error:
            raise AdapterError(
                f'{row.where} has "tools" that are not JSON ({error.msg}); write a list of objects'
            ) from None
        refuse_surrogates(Row(columns={"tools": tools}, where=row.where))
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise AdapterError(f'{row.where} has "tools" that are not objects; write a list of objects')
    return tools
