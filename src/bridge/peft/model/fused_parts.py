"""Which rows of a fused projection are its q, k and v, or its gate and up.

blocks        q … q k … k v … v                   GPT-2, Phi-3, MPT
heads         q k v of one head after the other    GPT-NeoX, Bloom
groups        the q of one group, its k, its v     Megatron
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from bridge.peft.errors import TargetError

#: A part's rows, as (first, end) in ascending order.
Rows = tuple[tuple[int, int], ...]
_QKV = ("q", "k", "v")
#: How the fused projections of a type of models lie, by their own names; "" for Megatron's.
_LAYOUTS: dict[str, dict[str, str]] = {
    "gpt2": {"c_attn": "blocks"},
    "mpt": {"Wqkv": "blocks"},
    "phi3": {"qkv_proj": "blocks", "gate_up_proj": "halves"},
    "bloom": {"query_key_value": "heads"},
    "gpt_neox": {"query_key_value": "heads"},
    "": {"linear_qkv": "groups"},
}


def rows_of_parts(
    model: nn.Module, fqn: str, out_features: int, parts: Sequence[str | Sequence[int]]
) -> Rows:
    """The rows of some parts of a fused projection.

    Args:
        model: Its config tells the number of heads.
        fqn: The projection's name.
        out_features: How many rows it has.
        parts: Names (`"q"`, `"gate"`), or ranges of rows (first, end).

    Raises:
        TargetError: A part is not known, or not in the projection.
    """
    known: dict[str, list[tuple[int, int]]] | None = None
    found: list[tuple[int, int]] = []
    for part in parts:
        if isinstance(part, str):
            if known is None:
                known = _known_parts(model, fqn, out_features)
            if part not in known:
                raise TargetError(
                    f"parts: {fqn} has no part {part!r}, only {', '.join(map(repr, known))}"
                )
            found += known[part]
        else:
            found.append((part[0], part[1]))
    return _joined(fqn, out_features, found)


def _joined(fqn: str, out_features: int, ranges: list[tuple[int, int]]) -> Rows:
    """Ranges in ascending order, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if not 0 <= start < stop <= out_features or (joined and start < joined[-1][1]):
            raise TargetError(
                f"parts: rows {start} to {stop} overlap others, or are not of the {out_features} "
                f"of {fqn}"
            )
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return tuple(joined)


def _known_parts(model: nn.Module, fqn: str, out_features: int) -> dict[str, list[tuple[int, int]]]:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layouts = _LAYOUTS.get(getattr(config, "model_type", None) or "", {})
    layout = layouts.get(fqn.rpartition(".")[2])
    if layout == "halves":
        half = out_features // 2
        return {"gate": [(0, half)], "up": [(half, out_features)]}
    sizes = None if layout is None else _sizes(config, out_features)
    if sizes is None:
        raise TargetError(
            f"parts: which rows of {fqn} are which is not known for this type of model; pass "
            "ranges of rows: parts={'…': [(first, end), …]}"
        )
    repeats = {"blocks": 1, "heads": sizes[3], "groups": sizes[4]}[layout or "blocks"]
    step = [size // repeats for size in sizes[:3]]
    return {name: list(_places(i, step, repeats)) for i, name in enumerate(_QKV)}


def _places(part: int, step: Sequence[int], repeats: int) -> Iterator[tuple[int, int]]:
    for i in range(repeats):
        start = i * sum(step) + sum(step[:part])
        yield start, start + step[part]


def _sizes(config: Any, out_features: int) -> tuple[int, int, int, int, int] | None:
    """Rows of q, k and v, and the numbers of heads and of groups; None where they do not add up."""
    heads = _count(config, ("num_attention_heads", "n_head", "n_heads"))
    if heads is None:
        return None
    groups = _count(config, ("num_key_value_heads", "num_query_groups")) or heads
    head_dim, left = divmod(out_features, heads + 2 * groups)
    if left or heads % groups:
        return None
    return heads * head_dim, groups * head_dim, groups * head_dim, heads, groups


def _count(config: Any, names: Sequence[str]) -> int | None:
    """The first of some settings that is a number."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
