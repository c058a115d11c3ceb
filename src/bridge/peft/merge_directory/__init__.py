"""Merge adapters into a model directory on disk, streaming: `merge_directory`."""

from bridge.peft.merge_directory.directory import merge_directory

__all__ = ["merge_directory"]
