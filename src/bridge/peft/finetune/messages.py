"""Check conversations of `role` and `content`, or of ShareGPT's `from` and `value`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bridge.peft.errors import AdapterError
from bridge.peft.finetune.data import Row

Messages = list[dict[str, Any]]

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}


def checked_messages(row: Row, key: str) -> Messages:
    """Return the conversation in a column, as OpenAI's API spells it; without what has no value.

    Raises:
        AdapterError: it is no such conversation; names the row, the key, the message and its role.
    """
    messages = row.columns[key]
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
