"""Merge adapters into a model directory on disk, streaming: `merge_directory`."""

from bridge.peft.merging.directory.merge import merge_directory

__all__ = ["merge_directory"]
