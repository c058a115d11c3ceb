"""Bytes that one rank holds: parameters, gradients, optimizer, gathered weights, activations.

In these formulas `T` = tp, `F` = fsdp, `N` = tokens on a rank, `r` = rank of a branch, `b` = bytes
of an element of the activations, which have the base's dtype. `docs/scaling.md` derives them; each
is compared with what real ranks allocate in `tests/test_scaling_ranks.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from bridge.peft.scaling.layout import OPTIMIZERS, Layout
from bridge.peft.scaling.shapes import Shapes, Tensor

#: Bytes of an element in which norms and attention keep what they need in full precision.
_FLOAT32 = 4
_HALF = 2


def parameter_memory(shapes: Shapes, layout: Layout) -> dict[str, int]:
    """Bytes of what a rank holds between steps, and of gradients.

        parameter   ceil(rows / F) · columns · bytes, of the shape split by T: FSDP2 pads rows
        gradient    the same, of what is trained only
        optimizer   states · the same

    Args:
        shapes: The model on paper.
        layout: How its ranks are divided.
    """
    shards = {t: t.shard_bytes(layout.tp, layout.shards) for t in shapes.tensors}
    trained = sum(size for t, size in shards.items() if t.trained)
    return {
        "base": sum(size for t, size in shards.items() if not t.adapter),
        "adapter": sum(size for t, size in shards.items() if t.adapter),
        "gradients": trained,
        "optimizer": OPTIMIZERS[layout.optimizer] * trained,
        "working_set": working_set(shapes, layout, trained),
    }


def working_set(shapes: Shapes, layout: Layout, trained: int) -> int:
    """Bytes of what is whole for a moment.

        FSDP2   root + max(3 · block, 2 · block + 2 · the block's gradients)
        DDP     the gradients once more, in its buckets

    The modules outside blocks stay gathered from the first use to the end of the backward. A block
    is gathered into one flat buffer and copied out of it into its parameters, while the buffer of
    the block before is still there. In backward a block is gathered while another computes, whose
    gradients are whole, and again in the buffer that is reduced and scattered.

    Args:
        shapes: The model on paper.
        layout: How its ranks are divided.
        trained: Bytes of the gradients between steps.
    """
    if layout.shards == 1:
        return trained if layout.dp > 1 else 0
    blocks = [shapes.groups[name] for name in shapes.blocks]
    root = gathered(shapes.groups[""], layout)
    largest = max((gathered(block, layout) for block in blocks), default=0)
    whole = (gathered((t for t in block if t.trained), layout) for block in blocks)
    return root + max(3 * largest, 2 * largest + 2 * max(whole, default=0))


def gathered(tensors: Iterable[Tensor], layout: Layout) -> int:
    """Bytes of tensors once FSDP2 has gathered them, padding included: F · shard."""
    return sum(layout.shards * t.shard_bytes(layout.tp, layout.shards) for t in tensors)


def branch_activations(shapes: Shapes, layout: Layout, block: str) -> int:
    """Bytes that branches keep for backward: x where the base keeps none, h, and casts of A and B.

        x   N · in · b        once for linears that read the same; in / T where inputs are split;
                              none where A is frozen
        h   N · r · b_h       for each branch; every rank of a tensor parallel group has all of it
        A, B in bfloat16      where float32 ones are multiplied with bfloat16 activations
        v   N · out · b       of DoRA: the output before it is rescaled, and the norms of out rows
        start                 h once more, and A and B beside it in one tensor each

    Linears read the same x if they have the same parent, width and style of splitting. What the
    base keeps anyway is not counted again: the output of fused attention, which `o_proj` reads.
    That is exact where `base_activations` knows the block, and a guess elsewhere.

    Args:
        shapes: The model on paper.
        layout: How its ranks are divided.
        block: The name of a block; `""` for what is outside of all.
    """
    reads: dict[tuple[str, int, str | None], int] = {}
    total = 0
    branches = [t for t in shapes.groups[block] if t.adapter]
    with_start = {t.module for t in branches if t.fqn.endswith("lora_start.a")}
    for tensor in branches:
        if len(tensor.shape) == 1:
            total += layout.tokens * tensor.shape[0] * shapes.itemsize + tensor.bytes(layout.tp)
            continue
        if shapes.half and tensor.itemsize > _HALF:
            total += tensor.bytes(layout.tp) * _HALF // tensor.itemsize
        elif tensor.module in with_start:
            total += tensor.bytes(layout.tp)
        if tensor.fqn.endswith("lora_start.a"):
            total += layout.tokens * tensor.shape[0] * _h_itemsize(shapes, tensor)
        if not tensor.fqn.endswith("lora_a.weight"):
            continue
        dim, width = tensor.local(layout.tp)
        parent, _, name = tensor.module.rpartition(".")
        total += layout.tokens * dim * _h_itemsize(shapes, tensor)
        # the joined A wants a gradient as A itself does
        if tensor.trained and not (name == "o_proj" and shapes.has_attention(block)):
            key = (parent, tensor.shape[1], shapes.style_of(tensor.module))
            reads[key] = layout.tokens * width * shapes.itemsize
    return total + sum(reads.values())


def _h_itemsize(shapes: Shapes, matrix: Tensor) -> int:
    """Bytes of an element of h: that of A as it is multiplied, bfloat16 with bfloat16."""
    return _HALF if shapes.half else matrix.itemsize


def base_activations(shapes: Shapes, layout: Layout, block: str) -> int | None:
    """Bytes that a frozen block of attention and a gated MLP keeps for backward; None: another one.

        norms       2 · N (d + 1) · 4                    their input and its scale, in float32
        attention   N (2 q + 2 kv) · b / T + N heads · 4 / T   q, k, v, output; the log-sum-exp
        MLP         3 · N f · b / T                      gate, its activation, up

    Of frozen linears nothing: dx needs the weight alone. With sequence parallel the norms keep
    their share of the tokens, N / T. Attention is a fused kernel, which keeps no N × N matrix.
    Below the first branch nothing needs a gradient, and nothing is kept.

    Args:
        shapes: The model on paper.
        layout: How its ranks are divided.
        block: Its name.
    """
    if not shapes.is_decoder(block):
        return None
    first = -1 if embeddings_want_gradient(shapes, layout) else shapes.first_adapted
    if (number := shapes.blocks.index(block)) < first:
        return 0
    linears = shapes.matrices(block)
    tokens, tp = layout.tokens, layout.tp
    norms = (1 if number == first else 2) * tokens * (linears["q_proj"].shape[1] + 1) * _FLOAT32
    if layout.sequence_parallel:
        norms //= tp
    outputs = {name: t.local(tp)[0] for name, t in linears.items()}
    attention = 2 * outputs["q_proj"] + outputs["k_proj"] + outputs["v_proj"]
    mlp = 3 * outputs["gate_proj"]
    kept = tokens * (attention + mlp) * shapes.itemsize
    return norms + kept + tokens * (shapes.heads or 0) * _FLOAT32 // tp


def activation_memory(shapes: Shapes, layout: Layout) -> dict[str, int | None]:
    """Bytes kept for backward, of branches and of the frozen base; None where it is not known.

    With checkpointing a block keeps its input, N · d · b, and the rest of one block at a time is
    there while that is computed again.

        without   Σ over blocks (branches + base)
        with      Σ over blocks N · d · b  +  max over blocks (branches + base)

    Args:
        shapes: The model on paper.
        layout: How its ranks are divided.
    """
    blocks = shapes.blocks
    base = [base_activations(shapes, layout, block) for block in blocks]
    known = [size for size in base if size is not None]
    whole = len(known) == len(base) > 0
    if not layout.checkpointing:
        return {
            "branch_activations": sum(branch_activations(shapes, layout, b) for b in ("", *blocks)),
            "base_activations": sum(known) if whole else None,
        }
    outside = branch_activations(shapes, layout, "")
    branches = max((branch_activations(shapes, layout, block) for block in blocks), default=0)
    inputs = sum(block_input(shapes, layout, block) for block in blocks)
    return {
        "branch_activations": outside + branches,
        "base_activations": inputs + max(known) if whole else None,
    }


def block_input(shapes: Shapes, layout: Layout, block: str) -> int:
    """Bytes of a block's input: as wide as that of its first matrix, N · d · b.

    Args:
        shapes: The model on paper.
        layout: How its ranks are divided.
        block: Its name.
    """
    first = next(iter(shapes.matrices(block).values()), None)
    size = 0 if first is None else layout.tokens * first.shape[-1] * shapes.itemsize
    return size // layout.tp if layout.sequence_parallel else size


def embeddings_want_gradient(shapes: Shapes, layout: Layout) -> bool:
    """Whether backward goes down to the embeddings' output.

    It does where they are trained, and with checkpointing: transformers then lets their output
    want a gradient.

    Args:
        shapes: The model on paper.
        layout: How its ranks are divided.
    """
    below = [t.trained for t in shapes.groups[""] if t.style in ("vocabulary", "embedding")]
    return layout.checkpointing or any(below)
