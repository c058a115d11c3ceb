"""Regexes out of files of unknown origin, kept from backtracking for ever.

Python's matcher tries one way after another, so a few nested repeats can keep it busy for longer
than anybody waits. A regex is accepted if it is short and its unbounded repeats are few and not
nested: then the work grows with a small power of the length of a module's name.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from bridge.peft.errors import AdapterFileError

MAX_REGEX_LENGTH = 200_000


def check_regex(regex: str, where: str) -> None:
    """Raise `AdapterFileError` unless `regex` compiles and matches in bounded time.

    Args:
        regex: In the syntax of `re`.
        where: The field that holds it, for the message.
    """
    if len(regex) > MAX_REGEX_LENGTH:
        raise AdapterFileError(f"{where} holds a regex of {len(regex):,} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(regex)
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise AdapterFileError(f"{where}: {regex[:80]!r} is no valid regex ({error})") from error


def regex_matches(regex: str, fqn: str) -> re.Match[Any] | None:
    """`re.fullmatch` of a checked regex."""
    return re.fullmatch(regex, fqn)
