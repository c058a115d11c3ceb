"""What a plan costs each rank of a distributed run: bytes held and bytes communicated a step."""

from __future__ import annotations

from bridge.peft.scaling.cost import RankCost, per_rank
from bridge.peft.scaling.layout import Layout

__all__ = ["Layout", "RankCost", "per_rank"]
