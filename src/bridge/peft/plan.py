"""What a recipe would adapt and what it costs, before anything is touched."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bridge.peft.dtypes import dtype_name
from bridge.peft.model.size import QuantisedPart
from bridge.peft.targets import Skipped
from bridge.peft.text_table import size, table


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One module, or one parameter, to adapt.

    Attributes:
        fqn: Fully qualified name.
        base_type: Class of the base.
        in_features: Size of the input.
        out_features: Size of the output.
        dim: Rank of the update.
        alpha: Scaling numerator.
        scale: Factor of the branch.
        dtype: Dtype of A and B.
        path: Which path computes the layer.
        reason: Why that path.
        magnitudes: Rows whose magnitude DoRA trains; 0 without it.
        subtracts: Whether a frozen start is subtracted from the branch (PiSSA, OLoRA).
        trains_a: False where A stays as it was drawn (LoRA-FA).
        quantised: How the base is quantised, and by what; None if it is not.
        stack: How many matrices of that shape there are: the experts of a parameter, else 1.
        used: How many of them a token meets.
        trained_rows: Rows of B that are trained; fewer than out_features where parts of a fused
            projection are.
        looked_up: Whether A is looked up, as an embedding's is, and not multiplied with.
    """

    fqn: str
    base_type: str
    in_features: int
    out_features: int
    dim: int
    alpha: float
    scale: float
    dtype: torch.dtype
    path: str
    reason: str
    magnitudes: int = 0
    trains_a: bool = True
    subtracts: bool = False
    quantised: str | None = None
    trained_rows: int
    looked_up: bool = False
    stack: int = 1
    used: int = 1

    @property
    def parameters(self) -> int:
        """Parameters of A and B together, of the start that is subtracted, and of DoRA's m."""
        return self.stack * self._products + self.magnitudes

    @property
    def _products(self) -> int:
        return (1 + self.subtracts) * self.dim * (self.in_features + self.out_features)

    @property
    def trainable(self) -> int:
        """Those that are trained: all but the start, and A where it is frozen."""
        of_a = self.dim * self.in_features if self.trains_a else 0
        return self.stack * (of_a + self.dim * self.trained_rows) + self.magnitudes

    @property
    def flops_per_token(self) -> int:
        """Multiplications and additions that the branch adds to one token's forward.

        DoRA's rescaling counts as one for each element; its norms are not for each token. An
        embedding's A is looked up, which is none.
        """
        multiplied = self.dim * self.out_features if self.looked_up else self._products
        return 2 * self.used * multiplied + self.magnitudes


@dataclass(frozen=True, kw_only=True)
class TrainedRow:
    """One module to train in full.

    Attributes:
        fqn: Fully qualified name.
        base_type: Its class.
        parameters: How many it has, those of its children included.
        bytes: Their size.
    """

    fqn: str
    base_type: str
    parameters: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class TokensRow:
    """One embedding of which the rows of some tokens are trained.

    Attributes:
        fqn: Fully qualified name.
        tokens: How many.
        embedding_dim: Length of a row.
        dtype: Dtype of the rows.
        followers: How many modules are tied to it, and have the same rows.
    """

    fqn: str
    tokens: int
    embedding_dim: int
    dtype: torch.dtype
    followers: int

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return self.tokens * self.embedding_dim

    @property
    def bytes(self) -> int:
        """Their size."""
        return self.parameters * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What would be adapted, what not, and the totals; `print(plan)` is a table.

    Attributes:
        rows: One per module to adapt, in the model's order.
        not_adapted: Linears, and what looks like one, that stay as they are, with the reason.
        base_parameters: Parameters of the model before; a quantised weight counts as the matrix
            that it stands for.
        base_bytes: What the model takes before, scales of quantised weights included.
        quantised: The quantised linears, adapted or not, by how they are quantised.
        trained_in_full: Modules trained beside the branches.
        token_rows: Embeddings of which some rows are trained.
        notes: What the user should know before training.
    """

    rows: tuple[PlanRow, ...]
    not_adapted: tuple[Skipped, ...]
    base_parameters: int
    base_bytes: int = 0
    quantised: tuple[QuantisedPart, ...] = ()
    trained_in_full: tuple[TrainedRow, ...] = ()
    token_rows: tuple[TokensRow, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def trainable(self) -> int:
        """Trainable parameters: of the branches, token rows, and the modules trained in full."""
        beside = (*self.trained_in_full, *self.token_rows)
        return sum(row.trainable for row in self.rows) + sum(row.parameters for row in beside)

    @property
    def _adapter_parameters(self) -> int:
        return sum(row.parameters for row in (*self.rows, *self.token_rows))

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters, the adapters included."""
        return self.trainable / (self.base_parameters + self._adapter_parameters)

    @property
    def adapter_file_bytes(self) -> int:
        """Size of the tensors in `adapter_model.safetensors`, in bytes; its header comes on top."""
        return sum(row.parameters * row.dtype.itemsize for row in self.rows) + self._full_bytes

    @property
    def _full_bytes(self) -> int:
        return sum(row.bytes for row in (*self.trained_in_full, *self.token_rows))

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments, in bytes, in the dtype of A and B."""
        trained = sum(row.trainable * row.dtype.itemsize for row in self.rows)
        return 2 * (trained + self._full_bytes)

    @property
    def flops_per_token(self) -> int:
        """Floating point operations that all branches add to one token's forward."""
        return sum(row.flops_per_token for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Rows, modules not adapted and totals, ready for JSON."""
        rows = [
            dataclasses.asdict(row)
            | {"dtype": dtype_name(row.dtype)}
            | {"trainable": row.trainable, "flops_per_token": row.flops_per_token}
            for row in self.rows
        ]
        totals = {
            "modules": len(self.rows),
            "trainable": self.trainable,
            "base_parameters": self.base_parameters,
            "base_bytes": self.base_bytes,
            "share": self.share,
            "adapter_file_bytes": self.adapter_file_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "flops_per_token": self.flops_per_token,
        }
        skipped = [dataclasses.asdict(item) for item in self.not_adapted]
        return {
            "rows": rows,
            "quantised": [dataclasses.asdict(part) for part in self.quantised],
            "trained_in_full": [dataclasses.asdict(row) for row in self.trained_in_full],
            "token_rows": [
                dataclasses.asdict(row) | {"dtype": dtype_name(row.dtype)}
                for row in self.token_rows
            ],
            "not_adapted": skipped,
            "notes": list(self.notes),
            "totals": totals,
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _base_lines(self) -> Iterator[str]:
        yield f"base {size(self.base_bytes)}"
        for part in self.quantised:
            yield (
                f"of it {size(part.bytes)} in {part.modules} linears of {part.label}, "
                f"{8 * part.bytes / part.parameters:.2f} bits a weight"
            )

    def _lines(self) -> Iterator[str]:
        yield from table(
            ("module", "type", "shape (out×in)", "rank", "scale", "trainable", "path"),
            _grouped(self.rows),
        )
        yield ""
        yield (
            f"{len(self.rows)} modules, {self.trainable:,} trainable parameters "
            f"({self.share:.3%} of the model)"
        )
        yield (
            f"adapter {size(self.adapter_file_bytes)}, AdamW state "
            f"{size(self.optimizer_bytes)}, +{self.flops_per_token:,} FLOPs per token (forward)"
        )
        yield from self._base_lines()
        for row in self.trained_in_full:
            yield f"trained in full: {row.fqn} ({row.base_type}, {row.parameters:,} parameters)"
        for row in self.token_rows:
            tied = f", and of {row.followers} modules tied to it" if row.followers else ""
            yield f"trained rows: {row.tokens} tokens of {row.fqn}{tied}"
        for note in self.notes:
            yield f"note: {note}"
        if self.not_adapted:
            yield ""
            yield "not adapted:"
            for (name, kind, reason), count in Counter(
                (_starred(item.fqn), item.base_type, item.reason) for item in self.not_adapted
            ).items():
                yield f"  {name}{_times(count)} ({kind}): {reason}"


def _kind(row: PlanRow) -> str:
    return row.base_type if row.quantised is None else f"{row.base_type}, {row.quantised}"


def _starred(fqn: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", fqn)


def _times(count: int) -> str:
    return f" ×{count}" if count > 1 else ""


def _grouped(rows: tuple[PlanRow, ...]) -> Iterator[tuple[str, ...]]:
    """One line for the same module in all layers: `model.layers.*.mlp.up_proj ×32`."""
    groups: dict[tuple[Any, ...], list[PlanRow]] = {}
    for row in rows:
        shape = f"{row.out_features}×{row.in_features}"
        if row.stack > 1:
            shape = f"{row.stack} of {shape}"
        if row.trained_rows < row.out_features:
            shape = f"{row.trained_rows} of {shape}"
        key = (_starred(row.fqn), _kind(row), shape, row.dim, f"{row.scale:g}", row.path)
        groups.setdefault(key, []).append(row)
    for (name, base_type, shape, dim, scale, path), members in groups.items():
        name = members[0].fqn if len(members) == 1 else f"{name}{_times(len(members))}"
        trainable = f"{sum(row.trainable for row in members):,}"
        yield name, base_type, shape, str(dim), scale, trainable, path
