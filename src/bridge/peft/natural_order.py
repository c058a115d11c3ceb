"""The order in which layer 2 comes before layer 10."""

from __future__ import annotations

import re


def natural_key(name: str) -> list[tuple[int, str]]:
    """A sort key that reads the numbers in a name as numbers.

    Example:
        >>> sorted(["layers.10", "layers.2"], key=natural_key)
        ['layers.2', 'layers.10']
    """
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]
