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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag: the field behind it, how typer reads it, how its words become the field's value."""

    field: dataclasses.Field[Any]
    annotation: Any
    parse: Callable[[Any], Any]
    help: str
    metavar: str | None = None


def takes_fields_of(
    *, skip: Mapping[str, Sequence[str]] | None = None, **groups: type
) -> Callable[[Callable], Callable]:
    """Give a command one flag per field of each dataclass.

    Args:
        skip: fields that get no flag, by parameter name.
        **groups: parameter name = dataclass. The command's parameter of that name, a dict, receives
            the fields whose flags were given, parsed to the field's type.

    Returns:
        A decorator; its result has the flags in its signature, where typer finds them.
    """

    def decorate(command: Callable) -> Callable:
        flags = {
            name: flags_of(group, skip=(skip or {}).get(name, ())) for name, group in groups.items()
        }

        def run(**words: Any) -> Any:
            for name, group in flags.items():
                given = {flag.field.name: words.pop(flag.field.name) for flag in group}
                words[name] = {
                    flag.field.name: flag.parse(given[flag.field.name])
                    for flag in group
                    if given[flag.field.name] not in (None, [])
                }
            return command(**words)

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p for p in own if p.name not in groups]
        for name, group in flags.items():
            parameters += [
                _parameter(flag, panel=groups[name].__name__.removesuffix("Options"))
                for flag in group
            ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def flags_of(group: type, *, skip: Sequence[str] = ()) -> list[Flag]:
    """Return the flags of a dataclass's fields.

    A field's help is its metadata's `help`, or what the class docstring says under its name.

    Raises:
        TypeError: a field of a type no flag is known for.
    """
    hints = typing.get_type_hints(group)
    documented = _documented_fields(group.__doc__ or "")
    flags = []
    for field in dataclasses.fields(group):
        if field.name not in skip:
            annotation, parse, metavar = _reading(field.name, hints[field.name])
            text = field.metadata.get("help") or documented.get(field.name, "")
            flags.append(
                Flag(
                    field=field,
                    annotation=annotation,
                    parse=parse,
                    help=_with_default(text, field),
                    metavar=metavar,
                )
            )
    return flags


def _reading(name: str, hint: Any) -> tuple[Any, Callable[[Any], Any], str | None]:
    """How typer reads a field of this type, how its words are parsed, and the name of its value."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = set(typing.get_args(hint) if union else (hint,)) - {type(None)}
    origins = {typing.get_origin(option) or option for option in options}
    classes = [origin for origin in origins if isinstance(origin, type)]
    if bool in classes:
        return bool | None, bool, None
    if torch.dtype in classes:
        return str | None, parse_dtype, "DTYPE"
    if any(issubclass(c, Mapping) for c in classes):
        return list[str] | None, _parse_numbers, "PATTERN=NUMBER"
    if any(issubclass(c, Sequence) and c is not str for c in classes):
        return list[str] | None, _parse_names, "NAME,..."
    for scalar in (float, int, str):
        if scalar in classes:
            return scalar | None, scalar, None
    if typing.Literal in origins:
        return str | None, str, None
    raise TypeError(f"no flag for field {name} of type {hint}")


def _documented_fields(docstring: str) -> dict[str, str]:
    """Return `name: text` entries of a Google-style `Args:` or `Attributes:` section."""
    section = re.search(
        r"^(?:Args|Attributes):\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(docstring), re.MULTILINE
    )
    entries = re.split(r"^    (?=\w)", section[1], flags=re.MULTILINE) if section else []
    pairs = (entry.partition(":") for entry in entries if ":" in entry)
    return {name.split(" ")[0]: " ".join(text.split()) for name, _, text in pairs}


def _with_default(text: str, field: dataclasses.Field[Any]) -> str:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    text = f"{text[:1].upper()}{text[1:]}".rstrip(".")
    if choices := field.metadata.get("choices"):
        text = f"{text}: {', '.join(choices)}"
    if default is dataclasses.MISSING or default in (None, False, {}, [], ()):
        return f"{text}."
    return f"{text} (default {default})."


def _parse_names(words: Sequence[str]) -> list[str] | str:
    """Split `a,b` into names; a regex keeps its commas; `all-linear` alone stays a word."""
    names: list[str] = []
    for word in words:
        names += [word] if word.startswith("re:") else [n.strip() for n in word.split(",")]
    names = [name for name in names if name]
    return names[0] if names == ["all-linear"] else names


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


def _parameter(flag: Flag, panel: str) -> inspect.Parameter:
    name = flag.field.name
    dashed = name.lower().replace("_", "-")
    is_on = flag.annotation == (bool | None) and flag.field.default is True
    names = f"--{dashed}/--no-{dashed}" if is_on else f"--{dashed}"
    option = typer.Option(
        names, help=flag.help, metavar=flag.metavar, rich_help_panel=panel, show_default=False
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[flag.annotation, option],
    )
