"""How a PEFT config names modules: by the ends of their names, by regex, by pattern."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from itertools import takewhile
from typing import Generic, TypeVar

from bridge.peft.formats.peft.regexes import BoundedRegex, Budget, plain_choice

T = TypeVar("T", bound=Hashable)
#: A name that is taken for a regex, so that its dots stand for any character.
_DOTTED = re.compile(r"[\w.-]+")


class NameMatcher:
    """The modules that a field of a config means; `fqn in matcher` says whether it means one.

    Args:
        value: Names, each meaning the modules that are called so or end in a dot and it; or a
            regex on the whole name.
        where: The field, for messages.
        budget: What the regex may cost.

    Attributes:
        names: The names; empty for a regex.

    Raises:
        AdapterFileError: The regex is not valid.
    """

    def __init__(self, value: str | Collection[str], where: str, budget: Budget) -> None:
        self.names: frozenset[str] = frozenset()
        self._regex: BoundedRegex | None = None
        self._choice: frozenset[str] = frozenset()
        if not isinstance(value, str):
            self.names = frozenset(value)
        elif choice := plain_choice(value):
            self._choice = frozenset(name.removeprefix("^") for name in choice)
        else:
            self._regex = BoundedRegex(value, where, budget)

    def __contains__(self, fqn: str) -> bool:
        if self._regex is not None:
            return self._regex.fullmatch(fqn)
        return fqn in self._choice or ends_in(fqn, self.names)


class Pattern(Generic[T]):
    """Values for modules by regexes on the ends of their names; the first that matches counts.

    Args:
        values: By regex.
        where: The field that holds them, for messages.
        budget: What the regexes may cost.

    Raises:
        AdapterFileError: A regex is not valid.
    """

    def __init__(self, values: Mapping[str, T], where: str, budget: Budget) -> None:
        # names are looked up, from their `^` or from any dot; each has its place and value
        self._plain: dict[str, tuple[int, T]] = {}
        self._regexes: list[tuple[int, T, str, BoundedRegex]] = []
        for place, (key, value) in enumerate(values.items()):
            if choice := plain_choice(key):
                for name in choice:
                    self._plain.setdefault(name, (place, value))
            else:
                regex = BoundedRegex(rf"(.*\.)?({key})$", where, budget)  # as PEFT writes it
                # a cheap look first: many files hold a name a module, its dots not escaped
                end = key.rpartition(".")[2] if _DOTTED.fullmatch(key) else ""
                self._regexes.append((place, value, end, regex))

    def value(self, fqn: str, default: T) -> T:
        """The value for the module of this name."""
        hits = [self._plain[n] for n in (f"^{fqn}", *name_ends(fqn)) if n in self._plain]
        first = min(hits, key=lambda hit: hit[0], default=None)
        for place, value, end, regex in self._regexes:
            if first is not None and place > first[0]:
                break
            if fqn.endswith(end) and regex.match(fqn):
                return value
        return default if first is None else first[1]


def name_ends(fqn: str) -> list[str]:
    """A name and all that follows any of its dots: `["a.b.c", "b.c", "c"]`."""
    parts = fqn.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def ends_in(fqn: str, names: Collection[str]) -> bool:
    """Whether `fqn` is one of the names, or ends in a dot and one of them."""
    return any(end in names for end in name_ends(fqn))


def common_part(names: Iterable[str]) -> str:
    """The dotted beginning that names share; empty if there is none.

    Args:
        names: Fully qualified names.
    """
    columns = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len({*parts}) == 1, columns))


def choose_targets(adapted: Iterable[str], others: Iterable[str]) -> list[str] | str:
    """The shortest `target_modules` that means exactly the adapted modules.

    Args:
        adapted: Names of the adapted modules.
        others: Names of all other modules.

    Returns:
        Last components; or full names where those would match more; or a regex where even those
        would.
    """
    wanted, rest = list(adapted), list(others)
    for entries in ({name.rpartition(".")[2] for name in wanted}, set(wanted)):
        if not any(ends_in(name, entries) for name in rest):
            return sorted(entries)
    return "^(?:" + "|".join(re.escape(name) for name in sorted(wanted)) + ")$"


def most_common_and_exceptions(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The most common value, and a PEFT pattern for the modules that have another.

    Args:
        values: By fully qualified name.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    ends = Counter(end for fqn in values for end in name_ends(fqn))
    return common, {
        # a name that other names end in is anchored
        ("^" if ends[fqn] > 1 else "") + re.escape(fqn): value
        for fqn, value in values.items()
        if value != common
    }
