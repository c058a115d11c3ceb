"""The result: what one rank holds and communicates, as a table and for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from bridge.peft.plan import Plan
from bridge.peft.scaling.layout import Layout
from bridge.peft.scaling.memory import activation_memory, gathered, parameter_memory
from bridge.peft.scaling.shapes import Shapes, shapes_of
from bridge.peft.scaling.tensor_traffic import tensor_traffic
from bridge.peft.scaling.traffic import Traffic, fsdp_traffic, replica_traffic
from bridge.peft.text_table import size, table

#: What is held, by its name in `RankCost.memory`.
_HELD = {
    "base": "base weights",
    "adapter": "A and B",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "working_set": "working set: weights gathered, gradients whole or in buckets",
    "branch_activations": "activations that the branches keep",
    "base_activations": "activations that the frozen base keeps",
}


@dataclass(frozen=True, kw_only=True)
class RankCost:
    """What one rank holds and communicates; `print(cost)` is a table.

    Attributes:
        layout: How the ranks are divided.
        memory: Bytes by what is held; None where it is not known. Not counted: logits and what
            else is outside blocks, temporaries of a layer, the allocator's and the driver's share.
        traffic: The collectives of one forward and backward.
        notes: What the user should know.
    """

    layout: Layout
    memory: dict[str, int | None]
    traffic: tuple[Traffic, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """All that is held, as far as it is known."""
        return sum(value or 0 for value in self.memory.values())

    @property
    def bytes_kept(self) -> int:
        """The activations among them, as far as they are known."""
        return sum(self.memory[f"{of}_activations"] or 0 for of in ("branch", "base"))

    @property
    def wire_bytes(self) -> int:
        """Bytes that the rank sends in a step."""
        return sum(t.wire_bytes for t in self.traffic)

    @property
    def adapter_wire_bytes(self) -> int:
        """The part of `wire_bytes` that is there because of what is trained."""
        return sum(t.adapter_wire_bytes for t in self.traffic)

    def to_dict(self) -> dict[str, Any]:
        """Layout, memory, traffic and totals, ready for JSON."""
        return {
            "layout": dataclasses.asdict(self.layout) | {"dp": self.layout.dp},
            "memory": dict(self.memory),
            "traffic": [
                dataclasses.asdict(t)
                | {"wire_bytes": t.wire_bytes, "adapter_wire_bytes": t.adapter_wire_bytes}
                for t in self.traffic
            ],
            "notes": list(self.notes),
            "totals": {
                "bytes": self.bytes,
                "wire_bytes": self.wire_bytes,
                "adapter_wire_bytes": self.adapter_wire_bytes,
                "global_tokens": self.layout.global_tokens,
            },
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield str(self.layout)
        yield ""
        held = [
            (_HELD[name], "not known" if value is None else size(value))
            for name, value in self.memory.items()
        ]
        yield from table(("held by a rank", ""), [*held, ("in all", size(self.bytes))])
        yield ""
        yield from table(
            ("communicated in a step", "collective", "ranks", "calls", "tensors", "sent by a rank"),
            [
                (
                    t.what,
                    t.collective,
                    f"{t.over} {t.ranks}",
                    "–" if t.calls is None else str(t.calls),
                    size(t.bytes),
                    size(t.wire_bytes),
                )
                for t in self.traffic
            ]
            + [("in all", "", "", "", "", size(self.wire_bytes))],
        )
        if self.wire_bytes:
            share = self.adapter_wire_bytes / self.wire_bytes
            yield f"{size(self.adapter_wire_bytes)} of it ({share:.1%}) because of what is trained"
        for note in self.notes:
            yield f"note: {note}"


def per_rank(plan: Plan, model: nn.Module, layout: Layout) -> RankCost:
    """Say what each rank of a run would hold and communicate; touches nothing, works on `meta`.

    Args:
        plan: `recipe.plan(model)`.
        model: The base model, in the dtype it would have.
        layout: How the ranks are divided.

    Raises:
        AdapterError: The model cannot be split so.
    """
    shapes = shapes_of(plan, model, layout.tp)
    return RankCost(
        layout=layout,
        memory=parameter_memory(shapes, layout) | activation_memory(shapes, layout),
        traffic=_traffic(shapes, layout),
        notes=tuple(_notes(shapes, layout)),
    )


def _traffic(shapes: Shapes, layout: Layout) -> tuple[Traffic, ...]:
    """All collectives of one forward and backward that move anything."""
    found = (
        *fsdp_traffic(shapes, layout),
        *replica_traffic(shapes, layout),
        *tensor_traffic(shapes, layout),
    )
    return tuple(t for t in found if t.ranks > 1 and t.bytes)


def _notes(shapes: Shapes, layout: Layout) -> Iterator[str]:
    adapter = [t for t in shapes.tensors if t.adapter]
    padded = gathered(adapter, layout)
    whole = sum(t.bytes(layout.tp) for t in adapter)
    if padded > 1.1 * whole:
        yield (
            f"over {layout.shards} ranks FSDP2 pads A and B from {size(whole)} to {size(padded)}, "
            "as A gets one row a rank at least; a smaller fsdp, with replicas (HSDP), avoids it"
        )
    if layout.tp > 1 and shapes.unknown_styles:
        yield (
            f"styles of tensor parallel not known here, counted as whole on every rank: "
            f"{', '.join(shapes.unknown_styles)}"
        )
    if not all(shapes.is_decoder(block) for block in shapes.blocks) or not shapes.blocks:
        yield (
            "what the frozen base keeps is known of blocks of attention, a gated MLP and two norms "
            "alone; what the branches of others share with it is a guess"
        )
