"""Write trained token rows into the embedding that they stand for, and back."""

from __future__ import annotations

import torch
from torch import nn

from bridge.peft.branch.token_rows import WithTokenRows
from bridge.peft.errors import AdapterError
from bridge.peft.model.disable import check_rows_kept
from bridge.peft.model.walk import token_rows_of, unwrap
from bridge.peft.tensors import all_finite, is_sharded


def check_rows_mergeable(model: nn.Module) -> None:
    """Raise `AdapterError` unless all token rows can be written into their embeddings.

    Args:
        model: A model.
    """
    for fqn, module in token_rows_of(model):
        weight, rows = module.base_weight, module.rows.weight
        if module.merged:
            raise AdapterError(f"{fqn} is merged already; unmerge(model) first")
        if not module.adapter_enabled:
            raise AdapterError(f"{fqn} is switched off; leave disable_adapters before you merge")
        if is_sharded(weight):
            raise AdapterError(
                f"{fqn} is sharded (DTensor); save the adapter and merge it into the unsharded base"
            )
        if weight.is_meta or rows.is_meta:
            raise AdapterError(f"{fqn} is on the meta device; load its weights before merging")
        if not all_finite(rows.to(weight.dtype)):
            raise AdapterError(f"{fqn}: a token row holds NaN or inf, or overflows; nothing merged")


@torch.no_grad()
def merge_token_rows(model: nn.Module, *, keep_base: bool) -> tuple[str, ...]:
    """Write token rows into the base weights, in place; what is tied to one has them too.

    Args:
        model: A model that `check_rows_mergeable` has passed.
        keep_base: Keep the base's rows on the CPU.

    Returns:
        What was written, for the report.
    """
    notes: list[str] = []
    for fqn, module in token_rows_of(model):
        weight, rows = module.base_weight, module.rows
        kept = weight[rows.indices].to("cpu", copy=True) if keep_base else None
        weight[rows.indices] = rows.weight.to(weight.dtype)
        module.unmerged_rows = kept
        _set_merged(model, module, merged=True)
        notes.append(f"{len(rows.tokens)} token rows were written into {fqn}")
    return tuple(notes)


@torch.no_grad()
def unmerge_token_rows(model: nn.Module) -> None:
    """Restore the base's rows bit for bit, in place.

    Args:
        model: A model, merged or not.

    Raises:
        AdapterError: The rows were given up.
    """
    merged = [(fqn, module) for fqn, module in token_rows_of(model) if module.merged]
    for fqn, module in merged:
        check_rows_kept(fqn, module)
    for _, module in merged:
        assert module.unmerged_rows is not None
        weight = module.base_weight
        weight[module.rows.indices] = module.unmerged_rows.to(weight)
        module.unmerged_rows = None
        _set_merged(model, module, merged=False)


def _set_merged(model: nn.Module, embedding: WithTokenRows, *, merged: bool) -> None:
    for module in unwrap(model).modules():
        if isinstance(module, WithTokenRows) and module.rows is embedding.rows:
            module.merged = merged
