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
from typing import Literal

from bridge.peft.scaling.layout import Layout
from bridge.peft.scaling.memory import gathered
from bridge.peft.scaling.shapes import Shapes, Tensor

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


def traffic(shapes: Shapes, layout: Layout) -> tuple[Traffic, ...]:
    """All collectives of one forward and backward.

    Args:
        shapes: The model on paper.
        layout: How its ranks are divided.
    """
    found = [*_fsdp(shapes, layout), *_replicas(shapes, layout), *_tensor(shapes, layout)]
    return tuple(t for t in found if t.ranks > 1 and t.bytes)


def _fsdp(shapes: Shapes, layout: Layout) -> Iterator[Traffic]:
    """FSDP2: every block is gathered in forward and again in backward, the rest once.

    weights     root + Σ blocks, then Σ blocks that a gradient reaches
    gradients   Σ trained, whole: each rank keeps its part of the sum
    """
    ranks = layout.shards
    if ranks == 1:
        return
    root = gathered(shapes.groups[""], layout)
    blocks = [gathered(shapes.groups[name], layout) for name in shapes.blocks]
    again = blocks[_first_reached(shapes) :]
    forward = [size for size in (root, *blocks) if size]
    over = {"over": "fsdp", "ranks": ranks}
    yield _of("weights, forward", "all-gather", forward, **over)
    yield _of("weights, backward", "all-gather", again, **over)
    yield _of("gradients", "reduce-scatter", _gradients(shapes, layout), adapter=True, **over)


def _first_reached(shapes: Shapes) -> int:
    """The first block that backward reaches: all are where the embeddings are trained."""
    below = [t.trained for t in shapes.groups[""] if t.style in ("vocabulary", "embedding")]
    return 0 if any(below) else shapes.first_adapted


def _gradients(shapes: Shapes, layout: Layout) -> list[int]:
    """Bytes of each group's gradients, whole."""
    groups = ([t for t in group if t.trained] for group in shapes.groups.values())
    return [gathered(group, layout) for group in groups if group]


def _replicas(shapes: Shapes, layout: Layout) -> Iterator[Traffic]:
    """Between replicas: all-reduce of the gradients that a rank holds; nothing of the base."""
    over = {"over": "dp", "ranks": layout.dp, "adapter": True}
    sizes = [size // layout.shards for size in _gradients(shapes, layout)]
    if layout.shards > 1:
        yield _of("gradients, replicas", "all-reduce", sizes, **over)
    else:  # DDP, in buckets of its own making
        yield Traffic(
            what="gradients, replicas",
            collective="all-reduce",
            calls=None,
            bytes=sum(sizes),
            **over,
        )


def _tensor(shapes: Shapes, layout: Layout) -> Iterator[Traffic]:
    """Tensor parallel: the base's outputs and input gradients, then what A and B add.

        row linear      forward: all-reduce of the output, N · out · b
        column linear   backward: all-reduce of the gradient of the input, N · in · b, where it
                        needs one: not at the first linears that a branch is on, nor below
        A of a column   backward: all-reduce of its gradient, r · in: its inputs are whole, the
                        gradient of its output is in parts
        B of a row      backward: all-reduce of its gradient, out · r: its input is in parts

    With sequence parallel an all-reduce of activations becomes a reduce-scatter there and an
    all-gather in the other direction: as many bytes over the wire.
    """
    if layout.tp == 1:
        return
    columns, rows = _columns(shapes), _styled(shapes, "row")
    yield from _activations("outputs of row linears", rows, 0, "forward", shapes, layout)
    yield from _activations("embeddings", _styled(shapes, "vocabulary"), 1, "forward", shapes, layout)
    yield from _activations("inputs of column linears", columns, 1, "backward", shapes, layout)
    over = {"over": "tp", "ranks": layout.tp}
    logits = [layout.tokens * t.shape[0] * shapes.itemsize for t in _styled(shapes, "head")]
    yield _of("logits", "all-gather", logits, **over)
    for matrix, style in (("lora_a", ("column", "head")), ("lora_b", ("row",))):
        whole = [
            t.bytes(layout.tp)
            for t in shapes.tensors
            if t.adapter and matrix in t.fqn and shapes.style_of(t.module) in style
        ]
        name = f"gradients of {matrix[-1].upper()} beside {style[0]} linears"
        yield _of(name, "all-reduce", whole, adapter=True, **over)


def _activations(
    what: str, linears: list[Tensor], side: int, when: str, shapes: Shapes, layout: Layout
) -> Iterator[Traffic]:
    """All-reduce of N · width · b, or its two halves under sequence parallel."""
    sizes = [layout.tokens * t.shape[side] * shapes.itemsize for t in linears]
    over = {"over": "tp", "ranks": layout.tp}
    if not layout.sequence_parallel:
        yield _of(f"{what}, {when}", "all-reduce", sizes, **over)
        return
    other = {"forward": "backward", "backward": "forward"}[when]
    yield _of(f"{what}, {when}", "reduce-scatter", sizes, **over)
    yield _of(f"{what}, {other}", "all-gather", sizes, **over)


def _styled(shapes: Shapes, style: str) -> list[Tensor]:
    return [t for t in shapes.tensors if not t.adapter and len(t.shape) == 2 and t.style == style]


def _columns(shapes: Shapes) -> list[Tensor]:
    """The column linears whose input needs a gradient: those behind the first branches."""
    reached = set(shapes.blocks[shapes.first_adapted :])
    columns = [t for t in (*_styled(shapes, "column"), *_styled(shapes, "head"))]
    columns = [t for t in columns if t.block in reached or not t.block]
    first = next((t for t in shapes.tensors if t.adapter), None)
    if first is None:
        return columns
    parent = first.module.rpartition(".")[0]
    return [t for t in columns if not t.block or t.module.rpartition(".")[0] != parent]


def _of(what: str, collective: Collective, sizes: Iterable[int], **more: object) -> Traffic:
    sizes = list(sizes)
    return Traffic(
        what=what,
        collective=collective,
        calls=len(sizes),
        bytes=sum(sizes),
        **more,  # pyright: ignore[reportArgumentType]
    )
