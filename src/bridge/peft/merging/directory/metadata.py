"""The files of a model directory that are no weights: copied, or brought up to date."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bridge.peft.merging.directory.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint

#: Weights in other formats would still be the base's, and training state is no part of a model.
_LEFT_OUT = frozenset(
    (
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
        *(".onnx_data", ".npz", ".pkl", ".pickle", ".part", ".lock"),
    )
)
_LEFT_OUT_NAMES = frozenset(("adapter_config.json", "bridge_adapter.json", "trainer_state.json"))
_FOLDERS = ("additional_chat_templates",)


def copy_other_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, licence and the like.

    Args:
        source: The base model's directory; links in it are followed.
        target: Where to; what is there is replaced.
    """
    for path in sorted(source.iterdir()):
        name = path.name
        if name in _FOLDERS and path.is_dir():
            shutil.copytree(path, target / name, dirs_exist_ok=True)
        if not path.is_file() or name.startswith(".") or path.suffix in _LEFT_OUT:
            continue
        if name not in _LEFT_OUT_NAMES and not name.endswith(".index.json"):
            shutil.copyfile(path, target / name)


def write_config(
    checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None, *, heads_differ: bool
) -> None:
    """Write `config.json` with the merged model's dtype and ties.

    Args:
        checkpoint: The base model.
        target: Directory to write to.
        dtype: The dtype of the merged weights, if it is another.
        heads_differ: Head and embedding are no longer the same.
    """
    config = json.loads(json.dumps(checkpoint.config))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        for part in parts:
            for key in ("dtype", "torch_dtype"):
                if isinstance(part.get(key), str):
                    part[key] = name
        if "torch_dtype" not in config:
            config["dtype"] = name
    if heads_differ:
        for part in parts:
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    write_json(target / CONFIG_NAME, config)


def write_index(
    checkpoint: Checkpoint, target: Path, places: Mapping[str, str], total_bytes: int
) -> None:
    """Write the index of a model in several files.

    Args:
        checkpoint: The base model.
        target: Directory to write to.
        places: The file of every tensor.
        total_bytes: Size of all tensors.
    """
    assert checkpoint.index is not None
    metadata = dict(checkpoint.index.get("metadata") or {}) | {"total_size": total_bytes}
    write_json(
        target / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON as transformers does, with an indent of two.

    Args:
        path: The file.
        value: What to write.
    """
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
