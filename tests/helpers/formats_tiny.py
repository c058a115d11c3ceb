"""A tiny model, an adapter of it in files, and ways to damage them."""

from __future__ import annotations

import json

import pytest
import safetensors.torch as st
import torch
from torch import nn

from bridge.peft import AdapterError, LoRA, adapter_state_dict, load_adapter, save_adapter

CONFIG, TENSORS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "bridge_adapter.json"
A = "base_model.model.first.lora_A.weight"


def tiny_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(4, 3), "second": nn.Linear(3, 2)})


def tiny_adapter(directory):
    model = LoRA(dim=2)(tiny_model())
    for tensor in adapter_state_dict(model).values():
        tensor.normal_()
    return save_adapter(model, directory)


def refused(directory, words):
    """The adapter is refused with an `AdapterError` of one line, and the model as it was."""
    model = tiny_model()
    with pytest.raises(AdapterError, match=words) as info:
        load_adapter(model, directory)
    assert str(info.value).isprintable()
    for ours, fresh in zip(model.modules(), tiny_model().modules(), strict=True):
        assert type(ours) is type(fresh)
    for ours, fresh in zip(model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(ours, fresh) and ours.requires_grad


def set_config(directory, name=CONFIG, **fields):
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def set_tensors(directory, **changes):
    tensors = st.load_file(directory / TENSORS)
    for key, value in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if value is not None:
            tensors[key.replace("__", ".")] = value
    (directory / TENSORS).write_bytes(st.save(tensors))
