"""Bytes that a rank communicates in one forward and backward, collective by collective.

The bytes of a collective are those of its whole tensor: what an all-gather gives, what a
reduce-scatter takes, what an all-reduce sums. Sent over the wire by each of `n` ranks, in a ring:

    all-gather, reduce-scatter    bytes · (n - 1) / n
    all-reduce                2 · bytes · (n - 1) / n

`T`, `F`, `N`, `r`, `b` as in `memory`; `docs/scaling.md` derives what follows, and
`tests/test_scaling_ranks.py` counts it on real ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

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
        adapter_bytes: The part that the frozen base alone would not need.
    """

    what: str
    collective: Collective
    over: str
    ranks: int
    calls: int | None
    bytes: int
    adapter_bytes: int = 0

    @property
    def wire_bytes(self) -> int:
        """Bytes that each rank sends, in a ring."""
        return self._sent(self.bytes)

    @property
    def adapter_wire_bytes(self) -> int:
        """The part of them that is there because of A and B, or of modules trained in full."""
        return self._sent(self.adapter_bytes)

    def _sent(self, size: int) -> int:
        times = 2 if self.collective == "all-reduce" else 1
        return times * size * (self.ranks - 1) // self.ranks


def fsdp_traffic(shapes: Shapes, layout: Layout) -> Iterator[Traffic]:
    """FSDP2: every block is gathered in forward and again in backward, the rest once.

        weights     root + Σ blocks, then Σ blocks that a gradient reaches
        gradients   Σ trained, whole: each rank keeps its part of the sum

    Args:
        shapes: The model on paper.
        layout: How its ranks are divided.
    """
    if layout.shards == 1:
        return
    first = 0 if embeddings_want_gradient(shapes, layout) else shapes.first_adapted
    yield _weights("weights, forward", ["", *shapes.blocks], shapes, layout)
    yield _weights("weights, backward", shapes.blocks[first:], shapes, layout)
    yield of(
        "gradients",
        "reduce-scatter",
        _gradients(shapes, layout),
        adapter=True,
        over="fsdp",
        ranks=layout.shards,
    )


def _weights(what: str, names: Sequence[str], shapes: Shapes, layout: Layout) -> Traffic:
    """All-gathers of groups of parameters, one each."""
    groups = [shapes.groups[name] for name in names if shapes.groups[name]]
    return Traffic(
        what=what,
        collective="all-gather",
        over="fsdp",
        ranks=layout.shards,
        calls=len(groups),
        bytes=sum(gathered(group, layout) for group in groups),
        adapter_bytes=gathered((t for group in groups for t in group if t.adapter), layout),
    )


def _gradients(shapes: Shapes, layout: Layout) -> list[int]:
    """Bytes of each group's gradients, whole."""
    groups = ([t for t in group if t.trained] for group in shapes.groups.values())
    return [gathered(group, layout) for group in groups if group]


def replica_traffic(shapes: Shapes, layout: Layout) -> Iterator[Traffic]:
    """Between replicas: all-reduce of the gradients that a rank holds; nothing of the base.

    Args:
        shapes: The model on paper.
        layout: How its ranks are divided.
    """
    sizes = [size // layout.shards for size in _gradients(shapes, layout)]
    sums = of("gradients, replicas", "all-reduce", sizes, adapter=True, over="dp", ranks=layout.dp)
    # DDP makes buckets of its own
    yield sums if layout.shards > 1 else dataclasses.replace(sums, calls=None)


def of(
    what: str,
    collective: Collective,
    sizes: Iterable[int],
    *,
    over: str,
    ranks: int,
    adapter: bool = False,
) -> Traffic:
    """A kind of collective, from the bytes of each call.

    Args:
        what: As in `Traffic`.
        collective: As in `Traffic`.
        sizes: Bytes of the whole tensor, a call each.
        over: As in `Traffic`.
        ranks: As in `Traffic`.
        adapter: Whether all of it is there because of what is trained.
    """
    sizes = list(sizes)
    return Traffic(
        what=what,
        collective=collective,
        over=over,
        ranks=ranks,
        calls=len(sizes),
        bytes=sum(sizes),
        adapter_bytes=sum(sizes) if adapter else 0,
    )
