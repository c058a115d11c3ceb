"""Whether the tensors of an adapter file and its config agree with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.peft.config import PeftConfig
from bridge.peft.formats.peft.extra import branch_settings, check_extra
from bridge.peft.formats.peft.keys import MAX_NAME_LENGTH, config_name

if TYPE_CHECKING:
    from bridge.peft.formats.peft.adapter_file import AdapterFile


def check_adapter(adapter: AdapterFile) -> None:
    """Raise `AdapterFileError` unless tensors and config agree with each other.

    Args:
        adapter: What was read or converted.
    """
    check_extra(adapter.extra)
    parsed = adapter.parsed
    for fqn, (a, b) in adapter.tensors.items():
        if not fqn.isprintable() or len(fqn) > MAX_NAME_LENGTH:
            raise AdapterFileError(f"{fqn[:80]!r} is not a module's name; save the adapter again")
        if fqn in adapter.parameters:  # checked when they were taken apart
            continue
        name = config_name(fqn, adapter.tensors)
        _check_shapes(fqn, parsed.rank_pattern.value(name, parsed.r), a, b)
        _check_rows(adapter, fqn, b)
        _check_magnitude(parsed, fqn, adapter.magnitudes.get(fqn), b)
        if parsed.target_modules is not None and not parsed.is_target(name):
            raise AdapterFileError(
                f"the file has tensors for {fqn}, which target_modules does not match; save the "
                "adapter again"
            )
    for fqn, rows in adapter.tokens.items():
        if fqn in adapter.tensors or len(adapter.token_indices(fqn)) != len(rows):
            raise AdapterFileError(
                f"the file has {len(rows)} token rows for {fqn}, and its config names "
                f"{len(adapter.token_indices(fqn))} tokens of it; save the adapter again"
            )
    if parsed.trainable_token_indices and not adapter.tokens:
        raise AdapterFileError(
            "the config says trainable_token_indices, and the file has no token rows; save the "
            "adapter again"
        )


def _check_rows(adapter: AdapterFile, fqn: str, b: Tensor) -> None:
    """Raise unless B is zero outside the rows that `bridge_adapter.json` says are trained."""
    rows = branch_settings(adapter.extra, adapter.name_in_file(fqn), 0.0)["rows"]
    if rows is None:
        return
    outside = torch.ones(b.shape[0], dtype=torch.bool)
    for start, stop in rows:
        outside[start:stop] = False
    if rows[-1][1] > b.shape[0] or bool(b[outside].any()):
        raise AdapterFileError(
            f"bridge_adapter.json trains some rows of B of {fqn}, and the file has others that "
            "are not zero; save the adapter again, or delete bridge_adapter.json"
        )


def _check_shapes(fqn: str, rank: int, a: Tensor, b: Tensor) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterFileError(
            f"{fqn}: the config gives it rank {rank}, the file A {tuple(a.shape)} and B "
            f"{tuple(b.shape)}; save the adapter again"
        )


def _check_magnitude(config: PeftConfig, fqn: str, magnitude: Tensor | None, b: Tensor) -> None:
    if magnitude is None and config.use_dora:
        raise AdapterFileError(
            f"the config says use_dora, and the file has no magnitude for {fqn}; save the adapter "
            "again"
        )
    if magnitude is None:
        return
    if not config.use_dora:
        raise AdapterFileError(
            f"the file has a magnitude for {fqn} (DoRA), and its config does not say use_dora; "
            "save the adapter again"
        )
    if magnitude.shape != b.shape[:1]:
        raise AdapterFileError(
            f"{fqn}: B {tuple(b.shape)} has {b.shape[0]} rows, and the magnitude is "
            f"{tuple(magnitude.shape)}; save the adapter again"
        )
