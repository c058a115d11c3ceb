"""Command-line flags generated from the fields of a dataclass.

A flag that is not given stays out of the collected dict, so the dataclass keeps its own default and
a command can tell what the user asked for from what is assumed.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
import typer

from bridge.peft.dtypes import parse_dtype
from bridge.peft.errors import AdapterError


def takes_fields_of(
    *, skip: Mapping[str, Sequence[str]] | None = None, **groups: type
) -> Callable[[Callable], Callable]:
    """Give a command a flag for each field of each dataclass; the class docstring is their help.

    Args:
        skip: fields that get no flag, by parameter name.
        **groups: parameter name = dataclass. The command's parameter of that name, a dict, receives
            the fields whose flags were given, parsed to the field's type.
    """
    flags = {
        name: {
            field.name: _flag(field, group)
            for field in dataclasses.fields(group)
            if field.name not in (skip or {}).get(name, ())
        }
        for name, group in groups.items()
    }

    def decorate(command: Callable) -> Callable:
        def run(**words: Any) -> Any:
            for name, group in flags.items():
                words[name] = {
                    field: parse(word)
                    for field, (_, parse) in group.items()
                    if (word := words.pop(field)) not in (None, [])
                }
            return command(**words)

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p for p in own if p.name not in groups]
        parameters += [parameter for group in flags.values() for parameter, _ in group.values()]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _flag(
    field: dataclasses.Field[Any], group: type
) -> tuple[inspect.Parameter, Callable[[Any], Any]]:
    """A field as a command's parameter, and how the words given become its value."""
    annotation, parse, metavar = _reading(field.name, typing.get_type_hints(group)[field.name])
    dashed = field.name.lower().replace("_", "-")
    text = _documented_fields(group.__doc__ or "").get(field.name, "").rstrip(".")
    shown = field.default not in (dataclasses.MISSING, None, False, ())
    option = typer.Option(
        f"--{dashed}/--no-{dashed}" if field.default is True else f"--{dashed}",
        help=f"{text} (default {field.default})." if shown else f"{text}.",
        metavar=metavar,
        rich_help_panel=group.__name__.removesuffix("Options"),
        show_default=False,
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    typed = Annotated[annotation, option]
    return inspect.Parameter(field.name, kind, default=None, annotation=typed), parse


def _reading(name: str, hint: Any) -> tuple[Any, Callable[[Any], Any], str | None]:
    """How typer reads a field of this type, how its words are parsed, and the name of its value."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = set(typing.get_args(hint) if union else (hint,)) - {type(None)}
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            return str | None, str, "|".join(typing.get_args(option))
    classes = [typing.get_origin(option) or option for option in options]
    if torch.dtype in classes:
        return str | None, parse_dtype, "DTYPE"
    if Mapping in classes:
        maps = next(option for option in options if typing.get_origin(option) is Mapping)
        if typing.get_args(maps)[1] in (int, float):
            return list[str] | None, _parse_numbers, "PATTERN=NUMBER"
        return list[str] | None, _parse_lists, "NAME=ITEM,..."
    if Sequence in classes:
        return list[str] | None, _parse_names, "NAME,..."
    for scalar in (bool, float, int, str):
        if scalar in classes:
            return scalar | None, scalar, None
    raise TypeError(f"no flag for field {name} of type {hint}")


def _documented_fields(docstring: str) -> dict[str, str]:
    """Return `name: text` entries of a Google-style `Attributes:` section."""
    section = re.search(
        r"^Attributes:\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(docstring), re.MULTILINE
    )
    entries = re.split(r"^    (?=\w)", section[1], flags=re.MULTILINE) if section else []
    pairs = (entry.partition(":") for entry in entries if ":" in entry)
    return {name: " ".join(text.replace("`", "").split()) for name, _, text in pairs}


def _parse_names(words: Sequence[str]) -> list[str] | str:
    """Split `a,b` into names; a regex keeps its commas; `all-linear` alone stays a word."""
    names: list[str] = []
    for word in words:
        names += [word] if word.startswith("re:") else [n.strip() for n in word.split(",")]
    names = [name for name in names if name]
    return names[0] if names == ["all-linear"] else names


def _parse_lists(words: Sequence[str]) -> dict[str, list[Any]] | list[Any]:
    """Turn `NAME=ITEM,ITEM` words into a dict of lists, `ITEM,ITEM` alone into a list.

    An item of digits is a number, `first:end` a pair of numbers, anything else a name.
    """
    lists: dict[str, list[Any]] = {}
    for word in words:
        name, _, items = word.rpartition("=")
        lists.setdefault(name, []).extend(_item(i.strip()) for i in items.split(",") if i.strip())
    if "" in lists and len(lists) > 1:
        raise AdapterError(
            f"{' '.join(words)!r} names a module for some items only; write NAME=ITEM,... for all"
        )
    return lists[""] if "" in lists else lists


def _item(word: str) -> int | str | tuple[int, ...]:
    numbers = word.split(":")
    if not all(n.isdecimal() for n in numbers) or len(numbers) > 2:
        return word
    return int(word) if len(numbers) == 1 else tuple(map(int, numbers))


def _parse_numbers(words: Sequence[str]) -> dict[str, int | float]:
    """Turn `PATTERN=NUMBER` words into a dict."""
    numbers: dict[str, int | float] = {}
    for word in words:
        pattern, _, number = word.rpartition("=")
        try:
            numbers[pattern] = int(number) if number.isdecimal() else float(number)
        except ValueError:
            pattern = ""
        if not pattern:
            raise AdapterError(f"{word!r} is not PATTERN=NUMBER; write for instance q_proj=16")
    return numbers
