"""Bytes that tensor parallel ranks communicate in one forward and backward.

    row linear      forward: all-reduce of its output, N · out · b
    column linear   backward: all-reduce of the gradient of its input, N · in · b
    vocabulary      forward: all-reduce of the embeddings, N · d · b
    output head     forward: all-gather of the logits, N · vocabulary · b; backward as a column
    A of a column   backward: all-reduce of its gradient, r · in: each rank's part of the output
                    gives a part of it
    B of a row      backward: all-reduce of its gradient, out · r: each rank's part of the input
                    gives a part of h

An input needs no gradient below the first branch. With sequence parallel, an all-reduce of
activations becomes a reduce-scatter there and an all-gather in the other direction. With
checkpointing a block's forward runs again, up to the inputs of its last linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridge.peft.scaling.layout import Layout
from bridge.peft.scaling.memory import embeddings_want_gradient
from bridge.peft.scaling.shapes import Shapes, Tensor
from bridge.peft.scaling.traffic import Traffic, of


def tensor_traffic(shapes: Shapes, layout: Layout) -> Iterator[Traffic]:
    """The collectives of the base, then those of A and B.

    Args:
        shapes: The model on paper.
        layout: How its ranks are divided.
    """
    over: dict[str, Any] = {"over": "tp", "ranks": layout.tp}

    def sizes(widths: list[int]) -> list[int]:
        return [layout.tokens * width * shapes.itemsize for width in widths]

    outputs = sizes([_output(t) for t in _base(shapes, "row", "vocabulary")])
    inputs = sizes([t.shape[1] for t in _columns(shapes, layout)])
    wanted = sizes([t.shape[1] for t in _columns(shapes, layout) if _wanted(t, shapes, layout)])
    again_outputs, again_inputs = (sizes(widths) for widths in _again(shapes, layout))
    logits = sizes([t.shape[0] for t in _base(shapes, "head")])
    if layout.sequence_parallel:
        below = shapes.comes_before_branches
        all_ = embeddings_want_gradient(shapes, layout)
        rows = [t.shape[0] for t in _base(shapes, "row") if all_ or not below(t)]
        yield of("inputs of column linears", "all-gather", inputs, **over)
        yield of("outputs of row linears", "reduce-scatter", outputs, **over)
        yield of("inputs, computed again", "all-gather", again_inputs, **over)
        yield of("outputs, computed again", "reduce-scatter", again_outputs, **over)
        yield of("gradients of outputs of row linears", "all-gather", sizes(rows), **over)
        yield of("gradients of inputs of column linears", "reduce-scatter", wanted, **over)
    else:
        yield of("outputs of row linears", "all-reduce", outputs, **over)
        yield of("outputs, computed again", "all-reduce", again_outputs, **over)
        yield of("gradients of inputs of column linears", "all-reduce", wanted, **over)
    yield of("logits", "all-gather", logits, **over)
    yield of(
        "gradients of A beside column linears",
        "all-reduce",
        _whole(shapes, "a"),
        adapter=True,
        **over,
    )
    yield of(
        "gradients of B beside row linears", "all-reduce", _whole(shapes, "b"), adapter=True, **over
    )


def _base(shapes: Shapes, *styles: str) -> list[Tensor]:
    """The base's matrices of some styles, those of tied ones too."""
    everything = (*shapes.tensors, *shapes.shared)
    return [t for t in everything if not t.adapter and len(t.shape) == 2 and t.style in styles]


def _output(tensor: Tensor) -> int:
    """How wide the output is: an embedding's weight lies the other way round."""
    return tensor.shape[1 if tensor.style == "vocabulary" else 0]


def _columns(shapes: Shapes, layout: Layout) -> list[Tensor]:
    """Column linears; with sequence parallel one of those that read the same, gathered once."""
    columns = _base(shapes, "column", "head")
    if not layout.sequence_parallel:
        return columns
    return list({_reads(t): t for t in reversed(columns)}.values())[::-1]


def _reads(tensor: Tensor) -> tuple[str, int]:
    """What a column linear reads: the same as those with the same parent and width."""
    return tensor.module.rpartition(".")[0], tensor.shape[1]


def _again(shapes: Shapes, layout: Layout) -> tuple[list[int], list[int]]:
    """Widths of the outputs, and of the inputs, that a checkpointed block communicates again."""
    outputs: list[int] = []
    if not layout.checkpointing:
        return outputs, []
    for block in shapes.blocks:
        outputs += [_output(t) for t in _base(shapes, "row") if t.block == block][:-1]
    return outputs, [t.shape[1] for t in _columns(shapes, layout) if t.block]


def _wanted(tensor: Tensor, shapes: Shapes, layout: Layout) -> bool:
    """Whether the input of a column linear needs a gradient: a branch has a part in it."""
    if embeddings_want_gradient(shapes, layout):
        return True
    first = shapes.first_branch
    at_first = first is not None and _reads(tensor)[0] == first.module.rpartition(".")[0]
    return not at_first and not shapes.comes_before_branches(tensor)


def _whole(shapes: Shapes, matrix: str) -> list[int]:
    """Bytes of the gradients of the replicated factors: A of columns, or B of rows."""
    styles = ("column", "head") if matrix == "a" else ("row",)
    name = f"lora_{matrix}.weight"
    factors = (t for t in shapes.tensors if t.adapter and t.fqn.endswith(name))
    return [t.bytes(1) for t in factors if shapes.style_of(t.module) in styles]
