"""Adapters of experts in one parameter, for a checkpoint that holds the experts apart."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bridge.peft.errors import AdapterError
from bridge.peft.formats.model_directory import Checkpoint
from bridge.peft.formats.peft import AdapterFile
from bridge.peft.formats.peft.experts import matrices_as_linears, separated
from bridge.peft.formats.peft.keys import config_name


def experts_apart(checkpoint: Checkpoint, adapter: AdapterFile) -> AdapterFile:
    """The adapter with every expert's linears under the names that the checkpoint has for them.

    Which those are only the model's class in transformers knows; it is made on `meta`, from the
    checkpoint's config.

    Args:
        checkpoint: The base model.
        adapter: As it was read.

    Raises:
        AdapterError: The checkpoint holds a stack of experts as one tensor, or the class is not at
            hand.
    """
    in_python = "load the model and the adapter in Python, merge(model) and save_pretrained"
    names = {fqn: config_name(fqn, adapter.tensors) for fqn in adapter.tensors}
    if attentions := [name for fqn, name in names.items() if name != fqn]:
        raise AdapterError(
            f"{attentions[0]} is an attention of torch, which is not merged on disk; {in_python}"
        )
    adapter = matrices_as_linears(adapter)
    if not adapter.parameters:
        return adapter
    first = min(adapter.parameters)
    if first in checkpoint.entries():
        raise AdapterError(
            f"{first} is a parameter in the checkpoint too, and no linear's, which is not merged "
            f"on disk; {in_python}"
        )
    model = _on_meta(checkpoint.config)
    if model is None:
        raise AdapterError(
            f"the adapter adapts {first}, experts in one parameter, and where the checkpoint holds "
            "them is not known without the model's class in transformers; install "
            "bridge-peft[finetune], or save the adapter with save_adapter(…, experts='separate')"
        )
    try:
        return separated(adapter, model)
    except AdapterError as error:
        raise AdapterError(f"{first} cannot be merged on disk ({error}); {in_python}") from error


def _on_meta(config: Mapping[str, Any]) -> nn.Module | None:
    """The model of a config without its weights; None where transformers does not know it."""
    try:
        transformers = importlib.import_module("transformers")
        cls = getattr(transformers, config["architectures"][0])
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return cls(cls.config_class.from_dict(dict(config)))
    except (ImportError, AttributeError, KeyError, IndexError, TypeError, ValueError):
        return None
