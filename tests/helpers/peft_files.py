"""Adapters that the real peft package makes, and ways to change their files as others do."""

from __future__ import annotations

import json
import warnings

import torch
from safetensors.torch import load_file, save_file

from tests.helpers import models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def logits(model):
    with torch.no_grad():
        return model.eval()(**models.inputs(model)).logits


def saved_by_peft(base, directory, **config):
    """Adapt `base` with PEFT, give all that is trained values of its own, and save it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, **config}))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        adapted.save_pretrained(directory)
    return adapted.base_model.model


def loaded_by_peft(base, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, directory).base_model.model


def rename_keys(directory, change):
    path = directory / TENSORS
    save_file({change(key): tensor for key, tensor in load_file(path).items()}, path)


def set_config(directory, **fields):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
