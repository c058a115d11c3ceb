"""Regexes out of files of unknown origin: what `re` answers, in bounded time.

PEFT matches with `re`, which cannot be stopped, and a short regex can run for ever. Here `re` only
says whether a regex is valid; the `regex` package matches it, against a clock that all regexes of
one file share. Where the two packages read a regex differently, it is rewritten or refused.
"""

from __future__ import annotations

import gc
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import regex as stoppable

from bridge.peft.errors import AdapterFileError

#: Seconds of this thread that compiling and matching all regexes of one file may take.
MAX_SECONDS = 0.6
#: Longest regex, each part counted as often as it must repeat: compiling it out takes that much.
MAX_REGEX_LENGTH = 20_000
#: What a choice of characters beyond Latin-1 counts as: Python lists all of them.
_WIDE_CHOICE_LENGTH = 1_000

#: A name as it is, or as `re.escape` writes it.
_PLAIN = re.compile(r"\^?(?:[\w-]|\\[.-])+\$?")
#: An escape, all characters but one, a repeat, or a brace that is not one.
_TOKENS = re.compile(
    r"\\N\{[^}]{0,100}\}|\\.|\[\^(?P<one>\\.|[^\\\n])\]"
    r"|\{(?:(?P<least>[0-9]+)(?:,[0-9]*)?|,[0-9]*)\}|(?P<brace>\{)",
    re.S,
)
#: Begins a class in one package only, or what the two do not answer alike in all cases.
_AMBIGUOUS = ("[:", "(?#", "(?(")
#: What the two packages answer alike for ASCII only.
_UNICODE_CLASS = re.compile(r"\\[bBdDsSwW]")
_IGNORES_CASE = re.compile(r"\(\?[a-zA-Z]*i")
_WIDE_CHARACTER = re.compile(r"[^\x00-\xff]|\\[uUN]")


class Budget:
    """Seconds that the regexes of one file may still take.

    Args:
        seconds: How many.
    """

    def __init__(self, seconds: float = MAX_SECONDS) -> None:
        self.left = seconds

    @contextmanager
    def spending(self, source: str) -> Iterator[None]:
        """Take the time within the context off; no garbage is collected in it, which would count.

        Args:
            source: The regex that it is spent on, for the message.

        Raises:
            AdapterFileError: None is left.
        """
        was_enabled = gc.isenabled()
        gc.disable()
        start = time.thread_time()
        try:
            yield
        finally:
            self.left -= time.thread_time() - start
            if was_enabled:
                gc.enable()
        if self.left <= 0:
            raise AdapterFileError(
                f"matching the regexes of adapter_config.json takes too long (at {source[:80]!r}); "
                "write the names of the modules instead"
            )


class BoundedRegex:
    """A regex that answers as `re` does, in bounded time, or refuses.

    Args:
        source: In the syntax of `re`.
        where: The field that holds it, for messages.
        budget: What compiling and matching it may cost.

    Raises:
        AdapterFileError: It is too long, not valid, or cannot be answered as `re` does.
    """

    def __init__(self, source: str, where: str, budget: Budget) -> None:
        self._source, self._where, self._budget = source, where, budget
        with budget.spending(source):
            self._regex = self._compiled()

    def _compiled(self) -> stoppable.Pattern[str]:
        source = self._source
        is_wide = _WIDE_CHARACTER.search(source) is not None
        if _length(source, is_wide) > MAX_REGEX_LENGTH:
            raise self._refused(f"longer than {MAX_REGEX_LENGTH:,} characters, repeats written out")
        if found := [part for part in _AMBIGUOUS if part in source]:
            raise self._refused(f"not supported ({found[0]!r})")
        ignores_case = _IGNORES_CASE.search(source) is not None
        if ignores_case and is_wide:
            raise self._refused("not supported (the case of characters beyond Latin-1)")
        self._is_for_ascii = ignores_case or _UNICODE_CLASS.search(source) is not None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(source)
                return stoppable.compile(
                    _TOKENS.sub(_unambiguous, source), stoppable.V0, cache_pattern=False
                )
        except (re.error, stoppable.error, RecursionError, OverflowError, KeyError) as error:
            raise self._refused(f"not valid ({error})") from error

    def fullmatch(self, text: str) -> bool:
        """Whether the regex matches all of `text`, as `re.fullmatch` says.

        Raises:
            AdapterFileError: The budget is spent, or the answer of `re` might be another.
        """
        return self._ask(self._regex.fullmatch, text)

    def match(self, text: str) -> bool:
        """Whether the regex matches the start of `text`, as `re.match` says.

        Raises:
            AdapterFileError: The budget is spent, or the answer of `re` might be another.
        """
        return self._ask(self._regex.match, text)

    def _ask(self, how: Callable[..., object], text: str) -> bool:
        if self._is_for_ascii and not (text.isascii() and text.isprintable()):
            raise self._refused(f"not supported for a module called {text[:80]!r}")
        found = False
        with self._budget.spending(self._source):
            try:
                # a limit below zero would be none
                found = how(text, timeout=max(self._budget.left, 1e-4)) is not None
            except (TimeoutError, MemoryError):
                self._budget.left = 0.0
        return found

    def _refused(self, reason: str) -> AdapterFileError:
        return AdapterFileError(
            f"{self._where}: the regex {self._source[:80]!r} is {reason}; write the names of the "
            "modules instead"
        )


def plain_choice(source: str) -> list[str] | None:
    r"""The names that a regex is a plain choice of, each with its `^` if it is anchored; or None.

    Such a regex, of any length, need not be compiled: `^(?:a\.b|c)$` and `a\.b|c` are two.

    Args:
        source: In the syntax of `re`.
    """
    anchored = source.startswith("^(?:") and source.endswith(")$")
    parts = (source[4:-2] if anchored else source).split("|")
    if not all(map(_PLAIN.fullmatch, parts)):
        return None
    names = [part.removesuffix("$").replace("\\", "") for part in parts]
    return [f"^{name.removeprefix('^')}" for name in names] if anchored else names


def _length(source: str, is_wide: bool) -> int:
    """The length of a regex with its repeats written out; at least that of the longest text."""
    if len(source) > MAX_REGEX_LENGTH:
        return len(source)
    least = (int(m["least"][:9]) for m in _TOKENS.finditer(source) if m["least"])
    written_out = len(source) * prod(max(1, n) for n in least)
    return written_out + is_wide * source.count("[") * _WIDE_CHOICE_LENGTH


def _unambiguous(token: re.Match[str]) -> str:
    """What the `regex` package reads as `re` reads the token."""
    if token["brace"]:
        return r"\{"  # a{e} would be "a, with errors"
    if one := token["one"]:
        one = one if one.isalnum() or one[0] == "\\" else f"\\{one}"
        return f"[^{one}{one}]"  # it gets [^a]|[^b] wrong, and [^aa]|[^bb] right
    return token[0]
