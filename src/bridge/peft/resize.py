"""Give an adapter another rank: the best approximation below, the same function above.

Of all updates of rank R the truncated singular value decomposition of `B A` is the nearest (Eckart
and Young, 1936). It is taken from the QR factors of A and B, so B A is never formed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bridge.peft.branch.functions.starts import is_start
from bridge.peft.branch.initializers import derive_seed, initialize
from bridge.peft.branch.options import check_dim
from bridge.peft.errors import AdapterError
from bridge.peft.formats.peft import AdapterFile
from bridge.peft.formats.peft.config import alpha_for
from bridge.peft.formats.peft.extra import branch_settings
from bridge.peft.formats.peft.fields import MAX_RANK
from bridge.peft.formats.peft.names import most_common_and_exceptions
from bridge.peft.low_rank import kept_energy, truncated
from bridge.peft.text_table import table


@dataclass(frozen=True, kw_only=True)
class ResizeRow:
    """What became of one module.

    Attributes:
        fqn: Fully qualified name.
        old_dim: Its rank before.
        dim: Its rank now.
        energy: Share of the update's squared singular values that is kept.
        full_dim: The rank that holds every update of it: the smaller of its two widths.
    """

    fqn: str
    old_dim: int
    dim: int
    energy: float
    full_dim: int


@dataclass(frozen=True)
class ResizeReport:
    """A row per module, in the file's order; prints as a table."""

    rows: tuple[ResizeRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The rows, ready for JSON."""
        return {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        errors = [math.sqrt(max(0.0, 1 - row.energy)) for row in self.rows]
        body = [
            (row.fqn, str(row.old_dim), str(row.dim), f"{row.energy:.4%}", f"{error:.2e}")
            for row, error in zip(self.rows, errors, strict=True)
        ]
        head = ("module", "rank before", "rank", "energy kept", "|change|/|update|")
        lines = list(table(head, body))
        worst = min(self.rows, key=lambda row: row.energy)
        if worst.energy < 1:
            lines += ["", f"least energy kept: {worst.energy:.4%} in {worst.fqn}"]
        if above := [row for row in self.rows if row.dim > row.full_dim]:
            lines += [
                "",
                f"rank {above[0].dim} is more than {len(above)} modules can use; "
                f"{above[0].full_dim} holds every update of {above[0].fqn}",
            ]
        return "\n".join(lines)


def resize(adapter: AdapterFile, dim: int, *, seed: int = 0) -> tuple[AdapterFile, ResizeReport]:
    """The adapter with rank `dim` in every module, its scales kept.

    A module of a higher rank gets the nearest update of rank `dim`. One of a lower rank keeps A and
    B; new rows of A start as in a fresh adapter, new columns of B at zero, so the update is the
    same and can be trained further. On an embedding it is the other way round.

    Args:
        adapter: As `read_adapter` gives it; it is not changed.
        dim: The new rank.
        seed: Seed of new rows of A.

    Returns:
        The new adapter and a report with a row per module.

    Raises:
        AdapterError: `dim` is not an integer of at least 1, more than a file may ask for, or
            lower than the rank of a DoRA adapter.

    Example:
        >>> smaller, report = resize(read_adapter("adapter"), 8)
        >>> write_adapter(smaller, "adapter-8")
    """
    check_dim(dim, "rank")
    if adapter.magnitudes and dim < max(adapter.rank(fqn) for fqn in adapter.tensors):
        raise AdapterError(
            f"a DoRA adapter cannot get the lower rank {dim}: its magnitudes belong to the norms "
            "of the whole update; train it at that rank, or pass a higher one"
        )
    if dim > MAX_RANK:
        raise AdapterError(f"rank is {dim}, and {MAX_RANK} is the largest that an adapter file has")
    extra = _without_starts(adapter.extra)
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    rows: list[ResizeRow] = []
    for fqn, (a, b) in adapter.tensors.items():
        method = branch_settings(extra, fqn, 0.0)["lora_A_init_method"]
        if (kernel := adapter.kernels.get(fqn)) is not None and kernel.groups > 1:
            raise AdapterError(
                f"{fqn} is a convolution of {kernel.groups} groups, whose B has blocks of one "
                "rank; it cannot be resized"
            )
        is_embedding = fqn in adapter.embeddings
        methods = ("zeros", "normal") if is_embedding else (method, "zeros")
        tensors[fqn] = _resized(a, b, dim, methods, derive_seed(seed, fqn))
        old, full, energy = a.shape[-2], min(a.shape[-1], b.shape[-2]), kept_energy(a, b, dim)
        rows.append(ResizeRow(fqn=fqn, old_dim=old, dim=dim, energy=energy, full_dim=full))
    rslora = adapter.parsed.use_rslora
    alphas = {fqn: alpha_for(adapter.scale(fqn), dim, rslora) for fqn in tensors}
    alpha, alpha_pattern = most_common_and_exceptions(alphas)
    alphas_now = {"lora_alpha": alpha, "alpha_pattern": alpha_pattern}
    config = adapter.config | {"r": dim, "rank_pattern": {}} | alphas_now
    resized = dataclasses.replace(adapter, config=config, tensors=tensors, extra=extra)
    return resized, ResizeReport(tuple(rows))


def _without_starts(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What is true of a resized adapter: it no longer holds a start to subtract."""
    exceptions = {f: _without_start(b) for f, b in extra.get("exceptions", {}).items()}
    return _without_start(extra) | ({"exceptions": exceptions} if exceptions else {})


def _without_start(branch: Mapping[str, Any]) -> dict[str, Any]:
    method = branch.get("lora_A_init_method", "")
    return {**branch} | ({"lora_A_init_method": "uniform"} if is_start(method) else {})


def _resized(
    a: Tensor, b: Tensor, dim: int, methods: tuple[str, str], seed: int
) -> tuple[Tensor, Tensor]:
    if a.dim() == 3:  # each expert with a seed of its own
        pairs = [
            _resized(*ab, dim, methods, seed ^ e) for e, ab in enumerate(zip(a, b, strict=True))
        ]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
    if dim < a.shape[0]:
        is_zero = ~b.any(1)  # rows that are not trained, which rounding must not touch
        a, b = truncated(a, b, min(dim, a.shape[1], b.shape[0]))
        b = b.masked_fill(is_zero.unsqueeze(1), 0.0)
    missing = dim - a.shape[0]  # also where the module is narrower than the rank
    if missing == 0:
        return a.contiguous(), b.contiguous()
    more_a, more_b = a.new_empty(missing, a.shape[1]), b.new_empty(b.shape[0], missing)
    for more, method in zip((more_a, more_b), methods, strict=True):
        initialize(more, method, seed)
    return torch.cat([a, more_a]), torch.cat([b, more_b], dim=1)
