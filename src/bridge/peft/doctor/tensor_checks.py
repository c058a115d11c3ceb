"""Checks that need A and B alone: finite, trained, and of the rank that they use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bridge.peft.doctor.report import Check, some
from bridge.peft.low_rank import used_rank

#: Share of the update's energy (its squared singular values) that a rank must hold.
ENERGY = 0.99
Pairs = Mapping[str, tuple[Tensor, Tensor]]


def tensor_checks(pairs: Pairs) -> list[Check]:
    """Check the tensors of an adapter."""
    finite = _finite(pairs)
    if finite.status == "fail":
        return [finite, Check("rank used", "skip", "the values are not finite")]
    return [finite, _trained(pairs), _rank_used(pairs)]


def _finite(pairs: Pairs) -> Check:
    name = "NaN and inf"
    bad = [f for f, ab in pairs.items() if not all(bool(torch.isfinite(t).all()) for t in ab)]
    if bad:
        fix = "train again with a lower learning rate or gradient clipping"
        return Check(name, "fail", f"not finite in {some(bad, len(pairs))}", fix)
    return Check(name, "pass", f"all values of {len(pairs)} modules are finite")


def _trained(pairs: Pairs) -> Check:
    name = "dead modules"
    dead = [fqn for fqn, (_, b) in pairs.items() if not bool(b.count_nonzero())]
    if not dead:
        return Check(name, "pass", "every B has moved from zero")
    if len(dead) == len(pairs):
        return Check(name, "warn", "every B is zero: the adapter was never trained")
    return Check(
        name,
        "warn",
        f"B is still zero in {some(dead, len(pairs))}",
        "these modules got no gradient: leave them out of target_modules, or see why the model "
        "does not use them",
    )


def _rank_used(pairs: Pairs) -> Check:
    name = "rank used"
    ranks = {f: (used_rank(a, b, ENERGY), a.shape[0]) for f, (a, b) in pairs.items()}
    moved = [used / dim for used, dim in ranks.values() if used]
    if not moved:
        return Check(name, "skip", "every update is zero")
    highest = max(used for used, _ in ranks.values())
    detail = f"{ENERGY:.0%} of the update in {sum(moved) / len(moved):.0%} of the rank on average"
    if max(moved) <= 0.5 and highest > 0:
        return Check(
            name,
            "warn",
            detail,
            f"bridge-peft resize ADAPTER --rank {highest} loses almost nothing",
        )
    return Check(name, "pass", detail)
