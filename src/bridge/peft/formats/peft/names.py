"""How a PEFT config names modules: by the ends of their names, by regex, by pattern."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Generic, Protocol, TypeVar

from bridge.peft.formats.peft.safe_regex import BoundedRegex, Budget

T = TypeVar("T")
#: A name as `re.escape` writes it, which need not be parsed.
_PLAIN = re.compile(r"\^?(?:\w|\\[.-])+")


class NameMatcher(Protocol):
    """Says which module names a field of a config means."""

    def matches(self, fqn: str) -> bool:
        """Whether the module of this name is meant."""
        ...


class NameEnds:
    """Modules whose name is one of `entries` or ends in a dot and one of them.

    Args:
        entries: Last components of names, or whole names.
    """

    def __init__(self, entries: Collection[str] = ()) -> None:
        self.entries = frozenset(entries)

    def matches(self, fqn: str) -> bool:
        """Whether the module of this name is meant."""
        return ends_in(fqn, self.entries)


class NameRegex:
    """Modules whose whole name matches a regex."""

    def __init__(self, regex: BoundedRegex) -> None:
        self._regex = regex

    def matches(self, fqn: str) -> bool:
        """Whether the module of this name is meant."""
        return self._regex.fullmatch(fqn)


class Pattern(Generic[T]):
    """Values for modules by regexes on the ends of their names; the first that matches counts.

    Args:
        values: By regex.
        where: The field that holds them, for messages.
        budget: What parsing and matching may cost.

    Raises:
        AdapterFileError: A regex is not valid.
    """

    def __init__(self, values: Mapping[str, T], where: str, budget: Budget) -> None:
        # plain texts are looked up; each is (place in the file, value)
        self._whole: dict[str, tuple[int, T]] = {}
        self._ends: dict[str, tuple[int, T]] = {}
        self._regexes: list[tuple[int, T, BoundedRegex]] = []
        for place, (key, value) in enumerate(values.items()):
            if _PLAIN.fullmatch(key):
                budget.spend(1, key)
                table = self._whole if key[0] == "^" else self._ends
                text = key.removeprefix("^").replace("\\", "")
                table.setdefault(text, (place, value))
                continue
            regex = BoundedRegex(key, where, budget)
            if regex.texts is None:
                whole = BoundedRegex(rf"(.*\.)?({key})", where, budget)
                self._regexes.append((place, value, whole))
                continue
            table = self._whole if regex.anchored else self._ends
            for text in regex.texts:
                table.setdefault(text, (place, value))

    def value(self, fqn: str, default: T) -> T:
        """The value for the module of this name."""
        tables = ((self._whole, (fqn,)), (self._ends, name_ends(fqn)))
        hits: list[tuple[int, Any]] = [
            table[name] for table, names in tables for name in names if name in table
        ]
        first = min(hits, key=lambda hit: hit[0], default=None)
        for place, value, regex in self._regexes:
            if first is not None and place > first[0]:
                break
            if regex.fullmatch(fqn):
                return value
        return default if first is None else first[1]


def name_ends(fqn: str) -> list[str]:
    """A name and all that follows any of its dots: `["a.b.c", "b.c", "c"]`."""
    parts = fqn.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def ends_in(fqn: str, entries: Collection[str]) -> bool:
    """Whether `fqn` is one of the entries, or ends in a dot and one of them."""
    return any(end in entries for end in name_ends(fqn))
