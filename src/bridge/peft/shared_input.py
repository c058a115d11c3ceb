"""Linears that read one input, such as q, k and v: found, and computed together.

The first of them that is called computes all, and the others take their results, as long as they
are called with the very same tensor and nothing they compute with has changed since.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.ops import LoRATensors, lora_linears


class SharedInput:
    """Some siblings, and the results of the last input that not all of them have taken yet.

    They are computed together until an input shows that they do not all read the same (k and v of
    a cross-attention read another than q); from then on those that were seen to do.

    Args:
        members: The linears by name, two or more, in the order in which they are called.

    Attributes:
        names: Their names.
        members: The linears.
    """

    def __init__(self, members: Mapping[str, LoRAMixin]) -> None:
        self.names, self.members = tuple(members), tuple(members.values())
        #: Which members are computed together; empty while they are watched.
        self._groups: list[tuple[int, ...]] = [tuple(range(len(members)))]
        #: While watched, for each member its input and the first member that had the same one.
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._pending: _Pending | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": {}, "_pending": None}

    def partners(self, member: LoRAMixin) -> list[str]:
        """Names of the other linears that are computed together with one.

        Args:
            member: One of the linears.
        """
        index = self._index(member)
        return [self.names[i] for i in self._group_of(index) if i != index]

    def take(self, member: LoRAMixin, x: Tensor) -> Tensor | None:
        """Return a member's result, or None if it must be computed alone.

        Args:
            member: The linear that is called.
            x: (..., in_features), its input.

        Returns:
            (..., out_features), or None.
        """
        index = self._index(member)
        if index is None:
            return None
        pending = self._pending
        if pending is not None and pending.holds(index, x, self.members):
            y = pending.results.pop(index)
            if not pending.results:
                self._pending = None
            return y
        if pending is not None and pending.is_untouched():
            self._groups, self._seen, self._pending = [], {}, None
        if not self._groups:
            self._watch(index, x)
        group = self._group_of(index)
        return self._compute(index, group, x) if len(group) > 1 else None

    def _compute(self, index: int, group: tuple[int, ...], x: Tensor) -> Tensor | None:
        layers = [self.members[i] for i in group]
        if any(m.merged or not m.adapter_enabled or m.dropout_now() for m in layers):
            return None
        if not all(m.has_plain_base() for m in layers):
            return None
        results = lora_linears(x, [_tensors(m) for m in layers])
        if results is None:
            return None
        self._pending = _Pending(x, dict(zip(group, results, strict=True)), self.members)
        return self._pending.results.pop(index)

    def _watch(self, index: int, x: Tensor) -> None:
        if index in self._seen:  # a second round begins
            groups: dict[int, list[int]] = {}
            for i, (_, first) in self._seen.items():
                groups.setdefault(first, []).append(i)
            self._groups = [tuple(group) for group in groups.values() if len(group) > 1]
            self._seen = {}
            return
        same = (first for ref, first in self._seen.values() if ref() is x)
        self._seen[index] = weakref.ref(x), next(same, index)

    def _index(self, member: LoRAMixin) -> int | None:
        """Its place; None of a copy of a member, as data parallelism makes them."""
        return next((i for i, m in enumerate(self.members) if m is member), None)

    def _group_of(self, index: int | None) -> tuple[int, ...]:
        return next((group for group in self._groups if index in group), ())


class _Pending:
    """Results that wait for their members, with the state in which they are valid."""

    def __init__(self, x: Tensor, results: dict[int, Tensor], members: Sequence[LoRAMixin]) -> None:
        self.x, self.results, self._count = x, results, len(results)
        self._states = {i: _state(members[i], x) for i in results}
        node = next(iter(results.values())).grad_fn
        if node is not None:
            # backward frees the one graph of all results, and who comes later needs one of its own
            own = weakref.ref(self)
            node.register_prehook(lambda *_: _expire(own()))

    def holds(self, index: int, x: Tensor, members: Sequence[LoRAMixin]) -> bool:
        """Whether a member's result is here and still what it would compute from x."""
        return (
            x is self.x
            and index in self.results
            and self._states[index] == _state(members[index], x)
        )

    def is_untouched(self) -> bool:
        """Whether only the member that computed them has taken its result."""
        return len(self.results) == self._count - 1


def _expire(pending: _Pending | None) -> None:
    if pending is not None:
        pending.results.clear()


def _state(member: LoRAMixin, x: Tensor) -> tuple[Any, ...]:
    """What must not have changed between the computation of a result and its use."""
    tensors = [t for t in _tensors(member)[:4] if t is not None]
    return (
        torch._C._is_any_autocast_enabled() and torch.get_autocast_dtype(x.device.type),
        member.scale,
        x.requires_grad,
        *(id(t) for t in tensors),
        *(0 if t.is_inference() else t._version for t in (x, *tensors)),
    )


def _tensors(member: LoRAMixin) -> LoRATensors:
    weight: Any = member.weight
    bias: Any = member.bias
    return LoRATensors(weight, bias, member.lora_a.weight, member.lora_b.weight, member.scale)
