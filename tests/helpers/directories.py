"""Model and adapter directories to merge, small enough to build in every test."""

import os
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from bridge.peft import LoRA, save_adapter
from bridge.peft.formats.peft import AdapterFile, read_adapter, write_adapter
from bridge.peft.merging.directory import merge_directory
from tests.helpers import models


def trained(model, size=0.1, seed=2, **recipe):
    model = LoRA(**({"dim": 4, "seed": seed} | recipe))(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "lora_b"):
                values = torch.randn(layer.lora_b.weight.shape, generator=generator) * size
                layer.lora_b.weight.copy_(values)
    return model.eval()


def case(path, kind="llama", dtype=torch.float32, shard="20KB", *, adapter=None, **config):
    """A base directory, an adapter directory and the adapted model."""
    torch.manual_seed(0)
    base = getattr(models, kind)(**config).to(dtype).eval()
    base.save_pretrained(path / "base", max_shard_size=shard)
    model = trained(base, **(adapter or {}))
    save_adapter(model, path / "adapter")
    return SimpleNamespace(
        base=path / "base", adapter=path / "adapter", out=path / "out", model=model
    )


def run(files, *, weight=1.0, **options):
    return merge_directory(files.base, [(files.adapter, weight)], files.out, **options)


def tensors(directory):
    found = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def logits(model):
    with torch.no_grad():
        return model(**models.inputs(model)).logits


def load(files, **options):
    model = type(files.model).from_pretrained(files.out, **options)
    return model.eval()


def with_whole_tensor(source, target, name, value):
    adapter = read_adapter(source)
    config = adapter.config | {"modules_to_save": [name.split(".")[-2]]}
    write_adapter(AdapterFile(config=config, tensors=adapter.tensors, whole={name: value}), target)


def cut(path, size):
    os.truncate(path, path.stat().st_size + size if size < 0 else size)
