"""transformers' own tensor parallelism, which puts a function before the forward of a module.

That function holds the module's forward from before (`original_forward`) and calls it with the
input made ready; an adapted module's must stand in its place.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether transformers has made a module tensor parallel."""
    return _cell_of_forward(module) is not None


def renew_forward(module: nn.Module) -> None:
    """Let transformers' function call the forward of the module's class as it is now, in place."""
    cell = _cell_of_forward(module)
    if cell is not None:
        cell.cell_contents = type(module).forward.__get__(module)


def _cell_of_forward(module: nn.Module) -> Any:
    forward: Any = vars(module).get("forward")
    if getattr(forward, "__module__", None) != "transformers.distributed.tensor_parallel":
        return None
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True))
    return cells.get("original_forward")
