"""Bytes that a rank communicates in one forward and backward, collective by collective.

The bytes of a collective are those of its whole tensor: what an all-gather gives, what a
reduce-scatter takes, what an all-reduce sums. Sent over the wire by each of `n` ranks, in a ring:

    all-gather, reduce-scatter    bytes · (n - 1) / n
    all-reduce                2 · bytes · (n - 1) / n

`T`, `F`, `N`, `r`, `b` as in `memory`; `docs/scaling.md` derives what follows, and
`tests/test_scaling_ranks.py` counts it on real ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from bridge.peft.scaling.layout import Layout
from bridge.peft.scaling.memory import embeddings_want_gradient, gathered
from bridge.peft.scaling.shapes import Shapes

Collective = Literal["all-gather", "reduce-scatter", "all-reduce"]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of collective in a step.

    Attributes:
        what: What is communicated.
        collective: How.
        over: Between which ranks: `"tp"`, `"fsdp"` or `"dp"`.
        ranks: How many those are.
        calls: How often; None where torch decides (DDP's buckets).
        bytes: The whole tensors of all calls.
        adapter: Whether the frozen base alone would not need it.
    """

    what: str
    collective: Collective
    over: str
    ranks: int
    calls: int | None
    bytes: int
    adapter: bool = False

    @property
    def wire_bytes(self) -> int:
        """Bytes that each rank sends, in a ring."""
        times = 2 if self.collective == "all-reduce" else 1
        return times * self.bytes * (self.ranks - 1) // self.ranks


def fsdp_traffic(shapes: Shapes, layout: Layout) -> Iterator[Traffic]:
    """FSDP2: every block is gathered in forward and again in backward, the rest once.

    weights     root + Σ blocks, then Σ blocks that a gradient reaches
    gradients   Σ trained, whole: each rank keeps its part of the sum
    """
    ranks = layout.shards
    if ranks == 1:
        return
    root = gathered(shapes.groups[""], layout)
    blocks = [gathered(shapes.groups[name], layout) for name in shapes.blocks]
    first = 0 if embeddings_want_gradient(shapes, layout) else shapes.first_adapted
    again = blocks[first:]
    forward = [size for size in (root, *blocks) if size]
    over = {"over": "fsdp", "ranks": ranks}
    yield of("weights, forward", "all-gather", forward, **over)
    yield of("weights, backward", "all-gather", again, **over)
    yield of("gradients", "reduce-scatter", _gradients(shapes, layout), adapter=True, **over)


def _gradients(shapes: Shapes, layout: Layout) -> list[int]:
    """Bytes of each group's gradients, whole."""
    groups = ([t for t in group if t.trained] for group in shapes.groups.values())
    return [gathered(group, layout) for group in groups if group]


def replica_traffic(shapes: Shapes, layout: Layout) -> Iterator[Traffic]:
    """Between replicas: all-reduce of the gradients that a rank holds; nothing of the base."""
    over = {"over": "dp", "ranks": layout.dp, "adapter": True}
    sizes = [size // layout.shards for size in _gradients(shapes, layout)]
    if layout.shards > 1:
        yield of("gradients, replicas", "all-reduce", sizes, **over)
    else:  # DDP, in buckets of its own making
        yield Traffic(
            what="gradients, replicas",
            collective="all-reduce",
            calls=None,
            bytes=sum(sizes),
            **over,
        )


def of(what: str, collective: Collective, sizes: Iterable[int], **more: Any) -> Traffic:
    """A kind of collective, from the bytes of each call.

    Args:
        what: As in `Traffic`.
        collective: As in `Traffic`.
        sizes: Bytes of the whole tensor, a call each.
        **more: The other attributes.
    """
    sizes = list(sizes)
    return Traffic(what=what, collective=collective, calls=len(sizes), bytes=sum(sizes), **more)
