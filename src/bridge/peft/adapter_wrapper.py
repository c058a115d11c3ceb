"""`AdapterWrapper`: a base and an adapter side by side, the base keeping its checkpoint names."""

from bridge.peft.branch.wrapper import AdapterWrapper

__all__ = ["AdapterWrapper"]
