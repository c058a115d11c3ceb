"""Adapters in the files of Hugging Face PEFT: from a model, into one, read, written."""

from bridge.peft.formats.peft.adapter_file import AdapterFile, read_adapter, write_adapter
from bridge.peft.formats.peft.model import load_adapter, save_adapter

__all__ = ["AdapterFile", "load_adapter", "read_adapter", "save_adapter", "write_adapter"]
