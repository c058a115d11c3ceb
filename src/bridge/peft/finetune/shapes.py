"""Recognise the layout of data and bring its rows to one of three shapes.

The shapes are `{"text"}`, `{"prompt", "completion"}` and `{"messages"}`, the last with `"tools"`
where there are any. Alpaca's and ShareGPT's rows become messages, and so do rows with a `system`
column.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bridge.peft.errors import AdapterError
from bridge.peft.finetune.data import Row

Shape = Literal["text", "prompt/completion", "messages"]
Messages = list[dict[str, Any]]

_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """Rows of one shape, and lines that say how they were read."""

    shape: Shape
    rows: list[Row]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class _Layout:
    name: str
    needs: tuple[str, ...]
    may_have: tuple[str, ...] = ()


_LAYOUTS = (
    _Layout(name="messages", needs=("messages",), may_have=("system", "tools")),
    _Layout(name="ShareGPT conversations", needs=("conversations",), may_have=("system", "tools")),
    _Layout(name="prompt/completion", needs=("prompt", "completion"), may_have=("system",)),
    _Layout(
        name="Alpaca instructions", needs=("instruction", "output"), may_have=("input", "system")
    ),
    _Layout(name="text", needs=("text",)),
)
_WANTED = (
    '"text", "prompt" and "completion", "messages", "conversations", or "instruction" and "output"'
)
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}


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
        if (other := _layout(row)) != layout:
            raise AdapterError(
                f"{row.where} has {other.name} columns but {rows[0].where} has {layout.name}; "
                "split the file, one kind of row each"
            )
    as_messages = _are_messages(layout, rows) or (
        has_chat_template and _may_be_messages(layout, rows)
    )
    read = [
        Row(columns=_messages_of(row) if as_messages else _plain(row, layout), where=row.where)
        for row in rows
    ]
    shape: Shape = "messages" if as_messages else _plain_shape(layout)
    how = "" if layout.name == shape else f", read as {shape}"
    if layout.name.startswith("Alpaca") and not as_messages:
        how += " with a blank line after the instruction and after the input"
    notes = [f"{name}: {len(rows):,} rows of {layout.name}{how}"]
    known = {*layout.needs, *layout.may_have}
    unread = dict.fromkeys(column for row in rows for column in row.columns if column not in known)
    if unread:
        notes.append(f"{name}: columns not read: {named(unread)}")
    return Recognised(shape=shape, rows=read, notes=notes)


def named(names: Iterable[object]) -> str:
    """List at most five names, and how many more there are."""
    shown = [repr(name) for name in names]
    more = len(shown) - _MOST_NAMED
    return ", ".join(shown[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _layout(row: Row) -> _Layout:
    columns = row.columns
    complete = [
        layout for layout in _LAYOUTS if all(columns.get(key) is not None for key in layout.needs)
    ]
    names = [layout.name for layout in complete]
    if names == ["Alpaca instructions", "text"]:  # the original's "text" is the row once more
        return complete[0]
    if len(complete) == 1:
        return complete[0]
    if complete:
        raise AdapterError(
            f"{row.where} has columns of {' and of '.join(names)}; keep those of one of them"
        )
    got = named(key for key, value in columns.items() if value is not None) or "none"
    if empty := [key for key, value in columns.items() if value is None]:
        got += f" (null: {named(empty)})"
    raise AdapterError(f"{row.where} has columns {got}; every row needs {_WANTED}")


def _are_messages(layout: _Layout, rows: Sequence[Row]) -> bool:
    return layout.name in ("messages", "ShareGPT conversations") or (
        layout.name == "prompt/completion"
        and any(isinstance(row.columns["prompt"], list) for row in rows)
    )


def _may_be_messages(layout: _Layout, rows: Sequence[Row]) -> bool:
    return layout.name.startswith("Alpaca") or (
        layout.name == "prompt/completion" and any(row.columns.get("system") for row in rows)
    )


def _plain_shape(layout: _Layout) -> Shape:
    return "text" if layout.name == "text" else "prompt/completion"


def _plain(row: Row, layout: _Layout) -> dict[str, Any]:
    if layout.name == "text":
        if not (text := _string(row, "text")):
            raise AdapterError(f'{row.where} has an empty "text"; remove the line')
        return {"text": text}
    if row.columns.get("system"):
        raise AdapterError(
            f'{row.where} has a "system" message but the tokenizer has no chat template to put it '
            'in; write it into the "prompt"'
        )
    if layout.name.startswith("Alpaca"):
        return {"prompt": f"{_instruction(row)}\n\n", "completion": _string(row, "output")}
    return {key: _string(row, key) for key in ("prompt", "completion")}


def _messages_of(row: Row) -> dict[str, Any]:
    columns = row.columns
    if "messages" in columns:
        messages = _checked(row, "messages", columns["messages"])
    elif "conversations" in columns:
        messages = _checked(row, "conversations", columns["conversations"])
    elif "instruction" in columns:
        messages = _exchange(_instruction(row), _string(row, "output"))
    elif isinstance(columns["prompt"], list):
        context = _checked(row, "prompt", columns["prompt"])
        said_before = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in context]
        messages = said_before + _checked(row, "completion", columns["completion"])
    else:
        messages = _exchange(_string(row, "prompt"), _string(row, "completion"))
    if columns.get("system"):
        if messages[0]["role"] == "system":
            raise AdapterError(
                f'{row.where} has a "system" column and a first message of role "system"; keep one'
            )
        messages = [{"role": "system", "content": _string(row, "system")}, *messages]
    tools = _tools(row)
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _string(row: Row, key: str) -> str:
    value = row.columns[key]
    if not isinstance(value, str):
        raise AdapterError(
            f'{row.where} has "{key}" of type {type(value).__name__}; write a string'
        )
    return value


def _instruction(row: Row) -> str:
    instruction = _string(row, "instruction")
    given = _string(row, "input") if row.columns.get("input") is not None else ""
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def _exchange(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _tools(row: Row) -> list[dict[str, Any]]:
    tools = row.columns.get("tools")
    if isinstance(tools, str):  # many published data sets hold them as JSON in a string
        try:
            tools = json.loads(tools or "[]")
        except json.JSONDecodeError as error:
            raise AdapterError(
                f'{row.where} has "tools" that are not JSON ({error.msg}); write a list of objects'
            ) from None
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise AdapterError(f'{row.where} has "tools" that are not objects; write a list of objects')
    return tools


def _checked(row: Row, key: str, messages: Any) -> Messages:
    if not isinstance(messages, list):
        raise AdapterError(
            f'{row.where} has "{key}" of type {type(messages).__name__}; '
            'write a list of {"role": ..., "content": ...}'
        )
    if not messages:
        raise AdapterError(f'{row.where} has no message in "{key}"; write at least one')
    return [
        _message(message, f'{row.where}, "{key}", message {number},')
        for number, message in enumerate(messages, start=1)
    ]


def _message(message: Any, where: str) -> dict[str, Any]:
    """Check a message; what has no value is left out, as chat templates want it."""
    if not isinstance(message, dict):
        raise AdapterError(
            f'{where} is a {type(message).__name__}; write {{"role": ..., "content": ...}}'
        )
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        got = 'no "role"' if role is None else f'a "role" of type {type(role).__name__}'
        raise AdapterError(f'{where} has {got}; write a string such as "user"')
    if isinstance(content, list):
        _check_parts(content, f'{where} of role "{role}"')
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        got = 'no "content"' if content is None else f'"content" of type {type(content).__name__}'
        raise AdapterError(f'{where} of role "{role}" has {got}; write a string')
    _check_weight(message, f'{where} of role "{role}"')
    return message


def _from_sharegpt(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    speaker = message["from"]
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise AdapterError(
            f'{where} has "from": {json.dumps(speaker)}; known are {", ".join(_SHAREGPT_ROLES)}'
        )
    if not isinstance(message.get("value"), str):
        raise AdapterError(f'{where} from "{speaker}" has no string as "value"; write one')
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": role, "content": message["value"], **rest}


def _check_parts(parts: list[Any], where: str) -> None:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise AdapterError(
                f"{where} has a content part of type {json.dumps(kind)} without usable text; "
                'write {"type": "text", "text": ...}, the only kind that is learned'
            )


def _check_weight(message: Mapping[str, Any], where: str) -> None:
    weight = message.get("weight", 0)
    if weight not in (0, 1):
        raise AdapterError(
            f'{where} has "weight": {json.dumps(weight)}, and a turn is either learned or not; '
            "write 1 or 0"
        )
    if weight and message["role"] != "assistant":
        raise AdapterError(
            f'{where} has "weight": 1, but only what the assistant says is learned; remove it'
        )
