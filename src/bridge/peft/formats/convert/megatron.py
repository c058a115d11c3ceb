"""LoRA adapters of Megatron models: fused linears, `linear_in` and `linear_out`.

    decoder.layers.N.self_attention.linear_qkv    q, k and v, interleaved by query group
    decoder.layers.N.self_attention.linear_proj   o
    decoder.layers.N.mlp.linear_fc1               gate over up
    decoder.layers.N.mlp.linear_fc2               down

Fused to separate is exact: each part takes A and its own rows of B. Separate to fused is exact at
the same rank where the parts have one A, else by stacking the ranks: A above A, and B block by
block. All modules of a Megatron adapter have one rank and one alpha; lower ranks are padded with
zeros, which changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.convert.converted import Converted, Step, extra_of, prefix_of, restored
from bridge.peft.formats.convert.layout import AttentionLayout, fuse_qkv, split_qkv
from bridge.peft.formats.convert.megatron_keys import (
    FUSED,
    Pair,
    group_by_fused,
    place_of,
    read_pairs,
)
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.config import alpha_for, new_config
from bridge.peft.formats.peft.names import choose_targets
from bridge.peft.low_rank import relative_difference, truncated

#: What `bridge_adapter.json` says of branches whatever the names.
_KEPT = ("dropout_position", "lora_A_init_method")


def to_megatron(
    adapter: AdapterFile, layout: AttentionLayout, rank: int | None = None
) -> Converted:
    """Convert a PEFT adapter of a Llama or Qwen type model.

    Args:
        adapter: The adapter.
        layout: The model's attention layout.
        rank: Approximate what needs a higher rank than this; None is exact.

    Returns:
        The tensors by Megatron's names, and how each came about.

    Raises:
        AdapterError: A module has no counterpart, or the scales differ by more than powers of two
            and no approximation was asked for.
    """
    prefix, groups = group_by_fused(adapter)
    scale = Counter(map(adapter.scale, adapter.tensors)).most_common(1)[0][0]
    fused: dict[str, Pair] = {}
    parts: dict[str, dict[str, Any]] = {}
    steps: list[Step] = []
    for name, group in groups.items():
        pairs, factors = _one_scale(adapter, group, scale, exact=rank is None)
        pairs = _alike(name, pairs)
        exact, columns, how = _fuse(name, pairs, layout)
        pair, error = exact, 0.0
        if rank is not None and exact[0].shape[0] > rank:
            pair, columns, how = truncated(*exact, rank), {}, f"approximated to rank {rank}"
            error = relative_difference(pair, exact)
        if not all(map(_is_power_of_two, factors.values())):
            how, error = f"{how}, scale folded into B", max(error, torch.finfo(pair[1].dtype).eps)
        fused[name] = pair
        parts[name] = {part: [*columns[part], factors[part]] for part in columns}
        steps.append(Step(name=name, how=how, error=error))
    dim = max(a.shape[0] for a, _ in fused.values())
    extra = extra_of(adapter, layout, dim, scale, format="megatron", prefix=prefix, parts=parts)
    config = _config_of(fused, dim, alpha_for(scale, dim), adapter, layout)
    return Converted(tensors=_named(fused, dim), extra=extra, steps=steps, config=config)


def from_megatron(
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, Any],
    layout: AttentionLayout,
    alpha: float,
) -> tuple[AdapterFile, list[Step]]:
    """Convert a Megatron adapter; exact.

    Args:
        tensors: By key of the file.
        extra: Its decoded `bridge_adapter.json`; empty if it has none.
        layout: The model's attention layout.
        alpha: The recipe's alpha; `scale = alpha / dim`.

    Returns:
        The adapter, and how each module came about.

    Raises:
        AdapterFileError: A key, a shape or `extra` is not right.
    """
    fused = read_pairs(tensors)
    scales = {name: alpha / pair[0].shape[0] for name, (*_, pair) in fused.items()}
    return _apart(fused, scales, extra, layout)


def from_megatron_model(
    adapter: AdapterFile, layout: AttentionLayout
) -> tuple[AdapterFile, list[Step]]:
    """Convert what `save_adapter` wrote of a Megatron model, under Megatron's names; exact.

    Args:
        adapter: The adapter; see `has_megatron_names`.
        layout: The model's attention layout.

    Returns:
        The adapter, and how each module came about.
    """
    places = {name: place_of(name) for name in adapter.tensors}
    fused = {p.name: (p.layer, p.fused, adapter.tensors[n]) for n, p in places.items() if p}
    scales = {p.name: adapter.scale(n) for n, p in places.items() if p}
    extra = {"dropout": adapter.parsed.lora_dropout}
    converted, steps = _apart(fused, scales, extra, layout)
    kept = {name: v for name, v in adapter.extra.items() if name in _KEPT}
    return dataclasses.replace(converted, extra=kept), steps


def _apart(
    fused: Mapping[str, tuple[int, str, Pair]],
    scale_of: Mapping[str, float],
    extra: Mapping[str, Any],
    layout: AttentionLayout,
) -> tuple[AdapterFile, list[Step]]:
    """The parts of fused linears, each with A and its own rows of B."""
    prefix, known = prefix_of(extra), extra.get("parts", {})
    if not isinstance(known, dict):
        raise AdapterFileError(f"bridge_adapter.json: parts must be an object, got {known!r:.80}")
    found: dict[str, Pair] = {}
    scales: dict[str, float] = {}
    steps: list[Step] = []
    for name, (layer, kind, pair) in fused.items():
        block, names = FUSED[kind]
        rows = _split(name, pair, names, layout)
        columns = _columns(known.get(name), rows, pair[0].shape[0])
        for part in columns or names:
            start, stop, factor = (columns or {}).get(part, (0, pair[0].shape[0], 1.0))
            fqn = f"{prefix}layers.{layer}.{block}.{part}"
            b = rows[part][:, start:stop]
            found[fqn] = (pair[0][start:stop].clone(), (b / factor if factor != 1 else b).clone())
            scales[fqn] = scale_of[name] * factor
            steps.append(Step(name=fqn, how=f"from {kind.rpartition('.')[2]}"))
    return restored(found, scales, extra, layout), steps


def _one_scale(
    adapter: AdapterFile, group: Mapping[str, str], scale: float, *, exact: bool
) -> tuple[dict[str, Pair], dict[str, float]]:
    """A and B of the parts, B multiplied so that `scale` is the scale of all."""
    pairs: dict[str, Pair] = {}
    factors: dict[str, float] = {}
    for part, fqn in group.items():
        a, b = adapter.tensors[fqn]
        if not adapter.scale(fqn):
            raise AdapterError(f"{fqn} has alpha 0, so it does nothing; leave it out")
        factor = adapter.scale(fqn) / scale
        if exact and not _is_power_of_two(factor):
            raise AdapterError(
                f"{fqn} has scale {adapter.scale(fqn):g}, most modules {scale:g}, and a Megatron "
                "adapter has one; pass --rank to allow rounding"
            )
        factors[part] = factor
        scaled = b.double() * factor
        pairs[part] = (a, b if factor == 1 else scaled.to(b.dtype))
        if not torch.isfinite(pairs[part][1]).all():
            raise AdapterError(
                f"{fqn}: B times {factor:g} overflows {b.dtype}; save the adapter in float32"
            )
        if exact and not torch.equal(pairs[part][1].double(), scaled):
            raise AdapterError(
                f"{fqn}: B times {factor:g} underflows {b.dtype}; save the adapter in float32, or "
                "pass --rank to allow rounding"
            )
    return pairs, factors


def _alike(name: str, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The parts of a fused linear, all A in the widest dtype of them, all B likewise."""
    widths = {a.shape[1] for a, _ in pairs.values()}
    heights = {b.shape[0] for part, (_, b) in pairs.items() if part in ("gate_proj", "up_proj")}
    if len(widths) > 1 or len(heights) > 1:
        shapes = ", ".join(f"{p} {b.shape[0]}×{a.shape[1]}" for p, (a, b) in pairs.items())
        raise AdapterError(
            f"{name}: its parts do not make one linear ({shapes}); save the adapter again"
        )
    dtype_a = reduce(torch.promote_types, (a.dtype for a, _ in pairs.values()))
    dtype_b = reduce(torch.promote_types, (b.dtype for _, b in pairs.values()))
    return {part: (a.to(dtype_a), b.to(dtype_b)) for part, (a, b) in pairs.items()}


def _is_power_of_two(factor: float) -> bool:
    return abs(math.frexp(factor)[0]) == 0.5


def _fuse(
    name: str, pairs: Mapping[str, Pair], layout: AttentionLayout
) -> tuple[Pair, dict[str, tuple[int, int]], str]:
    """The fused A and B, the columns of B that belong to each part, and how it was done."""
    order = FUSED[name.split(".", 3)[3]][1]
    given = [part for part in order if part in pairs]
    first = pairs[given[0]][0]
    if all(torch.equal(pairs[part][0], first) for part in given):
        columns = {part: (0, first.shape[0]) for part in given}
        a, how = first, "renamed" if len(order) == 1 else f"one A, rank {first.shape[0]}"
    else:
        ranks = [pairs[part][0].shape[0] for part in given]
        ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]
        columns = {part: (end - r, end) for part, end, r in zip(given, ends, ranks, strict=True)}
        a = torch.cat([pairs[part][0] for part in given])
        how = f"stacked, rank {ends[-1]} = {' + '.join(map(str, ranks))}"
    rows: dict[str, Tensor] = {}
    for part in order:
        height = _height(name, part, pairs, layout)
        rows[part] = a.new_zeros((height, a.shape[0]), dtype=pairs[given[0]][1].dtype)
        if part in pairs:
            rows[part][:, slice(*columns[part])] = pairs[part][1]
    b = fuse_qkv(rows, layout) if len(order) == 3 else torch.cat(list(rows.values()))
    return (a, b), columns, how


def _height(name: str, part: str, pairs: Mapping[str, Pair], layout: AttentionLayout) -> int:
    """Output features of a part, adapted or not."""
    have = pairs[part][1].shape[0] if part in pairs else None
    if part in ("q_proj", "k_proj", "v_proj"):
        wanted = layout.rows(part)
        if have not in (None, wanted):
            raise AdapterError(
                f"{name}: {part} has {have} rows, and {layout.heads} heads in {layout.groups} "
                f"groups of {layout.head_dim} need {wanted}; pass the right model or heads"
            )
        return wanted
    return have if have is not None else next(iter(pairs.values()))[1].shape[0]


def _named(fused: Mapping[str, Pair], dim: int) -> dict[str, Tensor]:
    """A and B of every module by Megatron's keys, with zeros up to rank `dim`."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in fused.items():
        more = dim - a.shape[0]
        tensors[f"{name}.adapter.linear_in.weight"] = F.pad(a, (0, 0, 0, more))
        tensors[f"{name}.adapter.linear_out.weight"] = F.pad(b, (0, more))
    return tensors


def _config_of(
    fused: Mapping[str, Pair],
    dim: int,
    alpha: float,
    adapter: AdapterFile,
    layout: AttentionLayout,
) -> dict[str, Any]:
    """A config by which `load_adapter` adapts a Megatron model."""
    layers = range(layout.layers or 0)
    others = [f"decoder.layers.{i}.{kind}" for i in layers for kind in FUSED]
    targets = choose_targets(fused, [name for name in others if name not in fused])
    ranks, alphas = dict.fromkeys(fused, dim), dict.fromkeys(fused, alpha)
    return new_config(ranks, alphas, targets, lora_dropout=adapter.parsed.lora_dropout)


def _split(
    name: str, pair: Pair, names: tuple[str, ...], layout: AttentionLayout
) -> dict[str, Tensor]:
    """The rows of B by part."""
    b = pair[1]
    wanted = sum(layout.rows(part) for part in names) if len(names) == 3 else None
    if wanted not in (None, b.shape[0]) or (b.shape[0] % len(names) and len(names) == 2):
        raise AdapterFileError(
            f"{name} has {b.shape[0]} rows, and {layout.heads} heads in {layout.groups} groups of "
            f"{layout.head_dim} need {wanted}; pass the right model or heads"
        )
    if len(names) == 3:
        return split_qkv(b, layout)
    return dict(zip(names, b.chunk(len(names)), strict=True))


def _columns(
    known: Any, rows: Mapping[str, Tensor], dim: int
) -> dict[str, tuple[int, int, float]] | None:
    """What `bridge_adapter.json` says of each part, if it still holds: outside it, B is zero."""
    if not isinstance(known, dict) or not known:
        return None
    columns: dict[str, tuple[int, int, float]] = {}
    for part, value in known.items():
        match value:
            case [int(start), int(stop), float() | int() as factor] if (
                part in rows and 0 <= start < stop <= dim and factor and math.isfinite(factor)
            ):
                columns[part] = (start, stop, float(factor))
            case _:
                raise AdapterFileError(f"bridge_adapter.json: parts holds {value!r:.80}")
    for part, b in rows.items():
        start, stop, _ = columns.get(part, (0, 0, 1.0))
        if bool(b[:, :start].any()) or bool(b[:, stop:].any()):
            return None
    return columns
