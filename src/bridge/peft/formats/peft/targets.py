"""Which modules a PEFT config means, and which config means given modules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from torch import nn

from bridge.peft.branch.kinds import Conv1DAdapter, LinearAdapter
from bridge.peft.branch.registry import kind_of
from bridge.peft.formats.peft.config import PeftConfig
from bridge.peft.formats.peft.names import NameEnds, ends_in
from bridge.peft.targets import output_heads

T = TypeVar("T", bound=Hashable)


def targets(config: PeftConfig, names: Mapping[str, nn.Module], model: nn.Module) -> set[str]:
    """The names of the modules that PEFT would adapt.

    Args:
        config: The config.
        names: The modules of the base model by fully qualified name, each once.
        model: The base model.
    """
    if config.targets is not None:
        return {fqn for fqn in names if fqn and is_target(config, fqn)}
    heads = output_heads(model)
    return {
        fqn
        for fqn, module in names.items()
        if kind_of(type(module)) in (LinearAdapter, Conv1DAdapter)
        and id(module) not in heads
        and not _is_excluded(config, fqn)
    }


def is_target(config: PeftConfig, fqn: str) -> bool:
    """Whether PEFT would adapt the module of this name; `"all-linear"` needs the model.

    Args:
        config: The config.
        fqn: A fully qualified name.
    """
    assert config.targets is not None
    if _is_excluded(config, fqn) or not config.targets.matches(fqn):
        return False
    if config.layers_to_transform is None:
        return True
    # PEFT looks at the layer only where the whole name is not listed
    whole = isinstance(config.targets, NameEnds) and fqn in config.targets.entries
    return whole or _layer_of(fqn, config.layers_pattern) in config.layers_to_transform


def _is_excluded(config: PeftConfig, fqn: str) -> bool:
    if config.excluded.matches(fqn):
        return True
    dotted = f".{fqn}."
    return any(f".{name}." in dotted for name in config.modules_to_save)


def _layer_of(fqn: str, patterns: Iterable[str]) -> int | None:
    """The first number in a name that stands behind one of the patterns, or behind any part."""
    parts = fqn.split(".")
    for pattern in patterns:
        lists = pattern.split(".")
        for i in range(len(lists), len(parts) - 1):
            if parts[i - len(lists) : i] == lists and parts[i].isdecimal():
                return int(parts[i])
    if not patterns:
        # with no pattern PEFT wants two parts before the number
        return next((int(part) for part in parts[2:-1] if part.isdecimal()), None)
    return None


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
    pattern: dict[str, T] = {}
    for fqn, value in values.items():
        if value != common:
            others = any(name.endswith(f".{fqn}") for name in values)
            pattern[("^" if others else "") + re.escape(fqn)] = value
    return common, pattern
