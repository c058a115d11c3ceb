"""Which modules a PEFT config means, and which config means given modules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from bridge.peft.formats.peft_config import PeftConfig
from bridge.peft.module_matcher import output_heads

T = TypeVar("T")


def is_target(config: PeftConfig, fqn: str) -> bool:
    """Whether PEFT would adapt the module of this name (`"all-linear"` aside).

    Args:
        config: The config.
        fqn: A fully qualified name.
    """
    if _is_excluded(config, fqn):
        return False
    if isinstance(config.target_modules, str):
        return re.fullmatch(config.target_modules, fqn) is not None
    return ends_in(fqn, config.target_modules) and _is_in_layers(config, fqn)


def targets(config: PeftConfig, names: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    """The names of the modules that PEFT would adapt.

    Args:
        config: The config.
        names: The modules of the base model by fully qualified name, each once.
        model: The base model.
    """
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        heads = output_heads(model)
        return [
            fqn
            for fqn, module in names.items()
            if is_linear(module) and id(module) not in heads and not _is_excluded(config, fqn)
        ]
    return [fqn for fqn in names if fqn and is_target(config, fqn)]


def is_linear(module: nn.Module) -> bool:
    """Whether PEFT counts a module among all linears."""
    return isinstance(module, nn.Linear)


def ends_in(fqn: str, entries: Collection[str]) -> bool:
    """Whether `fqn` is one of the entries, or ends in a dot and one of them."""
    parts = fqn.split(".")
    return any(".".join(parts[i:]) in entries for i in range(len(parts)))


def pattern_value(pattern: Mapping[str, T], fqn: str, default: T) -> T:
    """The value of the first pattern that matches the end of a name, as PEFT looks it up."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", fqn):
            return value
    return default


def _is_excluded(config: PeftConfig, fqn: str) -> bool:
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if re.fullmatch(excluded, fqn):
            return True
    elif ends_in(fqn, excluded):
        return True
    return any(re.match(rf"(^|.*\.){name}($|\..*)", fqn) for name in config.modules_to_save)


def _is_in_layers(config: PeftConfig, fqn: str) -> bool:
    if config.layers_to_transform is None or fqn in config.target_modules:
        return True
    patterns = [rf"(?:^|.*?\.){name}\." for name in config.layers_pattern] or [r".*?\.[^.]*\."]
    for pattern in patterns:
        if match := re.match(rf"{pattern}(?P<index>\d+)\.", fqn):
            return int(match["index"]) in config.layers_to_transform
    return False


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
    pattern: dict[str, Any] = {}
    for fqn, value in values.items():
        if value != common:
            others = [name for name in values if name != fqn and name.endswith(f".{fqn}")]
            pattern[("^" if others else "") + re.escape(fqn)] = value
    return common, pattern
