"""Whether the ranks of a group mean the same thing, asked before it is computed with."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from bridge.peft.errors import AdapterError


def check_alike(value: Any, what: str, fix: str, group: dist.ProcessGroup | None) -> None:
    """Raise `AdapterError`, on every rank, unless a value is the same on all; a collective.

    Args:
        value: Anything that can be pickled and compared.
        what: What it is, for the message.
        fix: What to do where it differs.
        group: The ranks; None is this process alone.
    """
    if group is None or group.size() == 1:
        return
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise AdapterError(
                f"the tensor parallel ranks differ in {what}: {values[0]!r:.200} on the first, "
                f"{other!r:.200} on number {rank}; {fix}"
            )
