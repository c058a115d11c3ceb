"""What merging did, layer by layer: the rounding, and where it swallowed the update."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from bridge.peft.merging.rounding import Rounding, Update
from bridge.peft.text_table import table

#: Above this share of weights that stay the same, an update counts as lost.
LOST = 0.5


@dataclass(frozen=True, kw_only=True)
class MergeRow:
    """What merging did to one layer.

    Attributes:
        fqn: Fully qualified name.
        max_error: Largest absolute difference between the stored weight and the sum of base
            weight and update, the update as it was computed.
        mean_error: Mean of that difference.
        unchanged: Share of the weights that the update did not change, of those it should have.
        relative_update: Frobenius norm of the change over that of the base weight.
    """

    fqn: str
    max_error: float
    mean_error: float
    unchanged: float
    relative_update: float

    @classmethod
    def of(cls, fqn: str, rounding: Rounding, update: Update) -> Self:
        """The row of one merged layer."""
        measured = rounding.count / max(update.count, 1)
        meant = update.meant() * measured
        base = math.sqrt(rounding.squares / measured) if measured else 0.0
        moved = math.sqrt(rounding.moved / measured) if measured else 0.0
        return cls(
            fqn=fqn,
            max_error=rounding.max_error,
            mean_error=rounding.sum_error / max(rounding.count, 1),
            unchanged=max(0.0, 1 - rounding.changed / meant) if meant else 0.0,
            relative_update=(update.norm() if update.factor is None else moved)
            / max(base, torch.finfo(torch.float32).tiny),
        )


@dataclass(frozen=True)
class MergeReport:
    """A row per merged layer; prints as a table, with a warning where an update was lost.

    Attributes:
        rows: One per layer, in the model's order.
        notes: What else the caller should know.
    """

    rows: tuple[MergeRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def lost(self) -> tuple[str, ...]:
        """Names of the layers where more than half of the update was lost to rounding."""
        return tuple(row.fqn for row in self.rows if row.unchanged > LOST)

    def to_dict(self) -> dict[str, Any]:
        """Rows, lost layers and notes, ready for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"rows": rows, "lost": list(self.lost), "notes": list(self.notes)}

    def __str__(self) -> str:
        head = ("module", "max error", "mean error", "unchanged", "|update|/|W|")
        body = (
            (
                row.fqn,
                f"{row.max_error:.2e}",
                f"{row.mean_error:.2e}",
                f"{row.unchanged:.1%}",
                f"{row.relative_update:.2e}",
            )
            for row in self.rows
        )
        lines = list(table(head, body))
        if self.lost:
            lines.append(
                f"warning: in {len(self.lost)} of {len(self.rows)} layers more than half of the "
                "update was too small for the weight's dtype; keep the adapter unmerged, or merge "
                "into float32 weights"
            )
        lines += [f"warning: {note}" for note in self.notes]
        return "\n".join(lines)
