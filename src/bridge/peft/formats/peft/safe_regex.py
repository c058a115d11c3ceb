"""Regexes out of files of unknown origin, matched in bounded time.

Python's matcher tries one path after another, and a short regex can have more paths than anybody
waits for. Here a regex is a map from sets of positions to sets of positions, part by part, as in
Thompson's automata (1968); a set is the bits of one integer. That visits every position once per
part, and the steps are counted against a budget that all regexes of one file share.
"""

from __future__ import annotations

import re
import warnings
from re import _constants as op  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

from bridge.peft.errors import AdapterFileError

MAX_REGEX_LENGTH = 100_000
#: Steps for all regexes of one file: well under a second.
MAX_STEPS = 1_000_000
_REPEAT_STEPS = 10
#: A choice of so many plain texts is looked up, not matched.
_MAX_TEXTS = 10_000

_ONE_CHARACTER = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
_CATEGORIES = {
    op.CATEGORY_DIGIT: re.compile(r"\d"),
    op.CATEGORY_NOT_DIGIT: re.compile(r"\D"),
    op.CATEGORY_SPACE: re.compile(r"\s"),
    op.CATEGORY_NOT_SPACE: re.compile(r"\S"),
    op.CATEGORY_WORD: re.compile(r"\w"),
    op.CATEGORY_NOT_WORD: re.compile(r"\W"),
}


class Budget:
    """Steps that the regexes of one file may still take.

    Args:
        steps: How many.
    """

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self.left = steps

    def spend(self, steps: int, regex: str) -> None:
        """Take `steps` off.

        Raises:
            AdapterFileError: None are left.
        """
        self.left -= steps
        if self.left < 0:
            raise AdapterFileError(
                f"matching the regexes of adapter_config.json takes too long (at {regex[:80]!r}); "
                "write the names of the modules instead"
            )


class BoundedRegex:
    """A regex that answers in bounded time, or refuses.

    Backreferences, atomic groups, possessive repeats and flags are refused.

    Args:
        regex: In the syntax of `re`.
        where: The field that holds it, for the message.
        budget: What parsing and matching it may cost.

    Attributes:
        regex: Its source.
        texts: All that it matches, or None if it is more than a choice of plain texts.
        anchored: Whether it begins with `^`.

    Raises:
        AdapterFileError: It is too long, not valid, or not supported.
    """

    def __init__(self, regex: str, where: str, budget: Budget) -> None:
        self.regex, self._budget = regex, budget
        if len(regex) > MAX_REGEX_LENGTH:
            raise AdapterFileError(
                f"{where} holds a regex of {len(regex):,} characters; list names"
            )
        budget.spend(200 + 4 * len(regex), regex)
        try:
            self._parts = _parse(regex)
            parts = list(self._parts)
            self.anchored = parts[:1] == [(op.AT, op.AT_BEGINNING)]
            at_end = parts[-1:] == [(op.AT, op.AT_END)]
            self.texts = self._plain_texts(parts[self.anchored : len(parts) - at_end])
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterFileError(
                f"{where}: {regex[:80]!r} is no regex that can be used ({error}); write the names "
                "of the modules instead"
            ) from error

    def fullmatch(self, text: str) -> bool:
        """Whether the regex matches all of `text`, as `re.fullmatch` would say.

        Raises:
            AdapterFileError: The budget is spent.
        """
        if self.texts is not None:
            self._budget.spend(1, self.regex)
            return text in self.texts
        try:
            ends = _Text(text, self._budget, self.regex).after(self._parts, 1)
        except RecursionError as error:
            raise AdapterFileError(f"{self.regex[:80]!r} is nested too deeply") from error
        return bool(ends >> len(text) & 1)

    def _plain_texts(self, parts: Any) -> frozenset[str] | None:
        """All texts that a choice of plain texts matches, or None if it is not one."""
        texts = frozenset(("",))
        for code, value in parts:
            ends: frozenset[str] | None = None
            if code is op.LITERAL:
                ends = frozenset((chr(value),))
            elif code is op.SUBPATTERN:
                ends = self._plain_texts(value[3])
            elif code is op.BRANCH:
                arms = [self._plain_texts(arm) for arm in value[1]]
                if None not in arms:
                    ends = frozenset().union(*(arm for arm in arms if arm is not None))
            if ends is None or len(texts) * len(ends) > _MAX_TEXTS:
                return None
            self._budget.spend(1 + len(texts) * len(ends) // 4, self.regex)
            texts = frozenset(text + end for text in texts for end in ends)
        return texts


class _Text:
    """A text, and which positions the parts of a regex reach in it; bit i is position i."""

    def __init__(self, text: str, budget: Budget, regex: str) -> None:
        self.text, self.budget, self.regex = text, budget, regex
        self.characters = (1 << len(text)) - 1
        self.step = 1 + len(text) // 500
        self.fitting: dict[int, int] = {}
        self.where: dict[str, int] = {}
        for i, character in enumerate(text):
            self.where[character] = self.where.get(character, 0) | 1 << i
        budget.spend(self.step + len(text) // 4, regex)

    def after(self, parts: Any, starts: int) -> int:
        """Where a sequence of parts can end that starts at any of `starts`."""
        for part in parts:
            self.budget.spend(self.step, self.regex)
            starts = self._after_part(part[0], part[1], starts)
            if not starts:
                break
        return starts

    def _after_part(self, code: Any, value: Any, starts: int) -> int:
        if code in _ONE_CHARACTER:
            return (starts & self._fitting(code, value)) << 1
        if code is op.BRANCH:
            ends = 0
            for arm in value[1]:
                self.budget.spend(self.step, self.regex)
                ends |= self.after(arm, starts)
            return ends
        if code is op.SUBPATTERN:
            return self.after(value[3], starts)
        if code in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, inner = value
            return self._repeat(least, most, inner, starts)
        if code is op.AT:
            return starts & self._places(value)
        wanted = code is op.ASSERT
        positions = (i for i in range(len(self.text) + 1) if starts >> i & 1)
        direction, inner = value
        return sum(1 << i for i in positions if self._looks(direction, inner, i) is wanted)

    def _fitting(self, code: Any, value: Any) -> int:
        """The positions of the characters that a one-character part matches."""
        if code is op.LITERAL:
            return self.where.get(chr(value), 0)
        if code is op.ANY:
            return self.characters & ~self.where.get("\n", 0)
        if id(value) not in self.fitting:
            kinds = len(value) if code is op.IN else 1
            self.budget.spend(len(self.where) * kinds, self.regex)
            fitting = (mask for c, mask in self.where.items() if _fits(code, value, c))
            self.fitting[id(value)] = sum(fitting)
        return self.fitting[id(value)]

    def _repeat(self, least: int, most: int, parts: Any, ends: int) -> int:
        self.budget.spend(_REPEAT_STEPS * self.step, self.regex)
        # More rounds than characters reach nothing that as many rounds do not reach.
        rounds = len(self.text) + 1
        for _ in range(min(least, rounds)):
            self.budget.spend(self.step, self.regex)
            before, ends = ends, self.after(parts, ends)
            if ends == before:
                break
        if len(parts) == 1 and parts[0][0] in _ONE_CHARACTER and most >= len(self.text):
            # Added to a run of ones, a bit carries to the end of the run.
            run = self._fitting(*parts[0])
            return ((ends & run) + run ^ run) | ends
        found = frontier = ends
        for _ in range(min(most - least, rounds)):
            frontier = self.after(parts, frontier) & ~found
            if not frontier:
                break
            self.budget.spend(self.step, self.regex)
            found |= frontier
        return found

    def _looks(self, direction: int, parts: Any, i: int) -> bool:
        if direction > 0:
            return self.after(parts, 1 << i) != 0
        width = parts.getwidth()[0]
        return i >= width and bool(self.after(parts, 1 << (i - width)) >> i & 1)

    def _places(self, place: Any) -> int:
        length = len(self.text)
        if place in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return 1
        if place is op.AT_END and self.text.endswith("\n"):
            return 1 << length | 1 << (length - 1)
        if place in (op.AT_END, op.AT_END_STRING):
            return 1 << length
        words = self._fitting(op.CATEGORY, op.CATEGORY_WORD)
        boundaries = words ^ words << 1
        return boundaries if place is op.AT_BOUNDARY else ~boundaries


def _fits(code: Any, value: Any, character: str) -> bool:
    """Whether a part that stands for one character matches it."""
    if code is op.ANY:
        return character != "\n"
    if code is op.IN:
        negated = value[0][0] is op.NEGATE
        return any(_fits(c, v, character) for c, v in value[negated:]) is not negated
    if code is op.RANGE:
        return value[0] <= ord(character) <= value[1]
    if code is op.CATEGORY:
        return _CATEGORIES[value].match(character) is not None
    return (ord(character) == value) is (code is op.LITERAL)


def _parse(regex: str) -> Any:
    """The parts of a regex; `re.error` if it is not valid or not supported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = parser.parse(regex)
    if parts.state.flags & ~re.UNICODE or not _is_supported(parts):
        raise re.error("flags, backreferences and atomic groups are not supported")
    return parts


def _is_supported(parts: Any) -> bool:
    for code, value in parts:
        if code is op.BRANCH:
            inner = value[1]
        elif code is op.SUBPATTERN:
            if value[1] or value[2]:
                return False
            inner = [value[3]]
        elif code in (op.MAX_REPEAT, op.MIN_REPEAT):
            inner = [value[2]]
        elif code in (op.ASSERT, op.ASSERT_NOT):
            inner = [value[1]]
        elif code in (*_ONE_CHARACTER, op.AT):
            continue
        else:
            return False
        if not all(_is_supported(arm) for arm in inner):
            return False
    return True
