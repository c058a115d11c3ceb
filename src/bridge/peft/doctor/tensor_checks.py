"""Checks that need A and B alone: finite, trained, and of the rank that they use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bridge.peft.doctor.report import Check, verdict
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
    bad = [f for f, ab in pairs.items() if not all(bool(torch.isfinite(t).all()) for t in ab)]
    fix = "train again with a lower learning rate or gradient clipping"
    good = f"all values of {len(pairs)} modules are finite"
    return verdict("NaN and inf", bad, len(pairs), "not finite in", fix, good=good)


def _trained(pairs: Pairs) -> Check:
    name = "dead modules"
    # an embedding's branch starts with A at zero, all others with B
    dead = [f for f, ab in pairs.items() if not all(bool(t.count_nonzero()) for t in ab)]
    if len(dead) == len(pairs):
        return Check(name, "warn", "every update is zero: the adapter was never trained")
    fix = (
        "these modules got no gradient: leave them out of target_modules, or see why the model "
        "does not use them"
    )
    good, found = "every update has moved from zero", "the update is still zero in"
    return verdict(name, dead, len(pairs), found, fix, good=good, status="warn")


def _rank_used(pairs: Pairs) -> Check:
    name = "rank used"
    ranks = {f: (used_rank(a, b, ENERGY), a.shape[-2]) for f, (a, b) in pairs.items()}
    moved = [used / dim for used, dim in ranks.values() if used]
    if not moved:
        return Check(name, "skip", "every update is zero")
    highest = max(used for used, _ in ranks.values())
    detail = f"{ENERGY:.0%} of the update in {sum(moved) / len(moved):.0%} of the rank on average"
    if max(moved) > 0.5:
        return Check(name, "pass", detail)
    fix = f"bridge-peft resize ADAPTER --rank {highest} loses almost nothing"
    return Check(name, "warn", detail, fix)
