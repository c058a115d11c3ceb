"""A model directory as it lies on disk: what its files hold, and all of them but the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bridge.peft.dtypes import dtype_name
from bridge.peft.errors import AdapterError
from bridge.peft.formats.files.adapter_tensors import checked_index
from bridge.peft.formats.files.safetensors_file import Entry, Header, read_header
from bridge.peft.formats.files.untrusted import CONFIG_NAME as ADAPTER_CONFIG_NAME
from bridge.peft.formats.files.untrusted import checked_path, read_json

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth")
#: Weights in other formats would still be the base's, and training state is not part of a model.
_LEFT_OUT = (
    *(*_PICKLES, ".safetensors", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data"),
    *(".npz", ".pkl", ".pickle", ".part", ".lock", ".index.json"),
    *("adapter_config.json", "bridge_adapter.json", "trainer_state.json"),
)
#: Files that hold a tokenizer's words, one of which every tokenizer has.
_VOCABULARIES = frozenset(
    (
        *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
        *("sentencepiece.bpe.model", "tekken.json"),
    )
)
_TOKENIZER_NAMES = (
    *sorted(_VOCABULARIES),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
_DTYPES = ("dtype", "torch_dtype")
_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class Checkpoint:
    """A model directory.

    Attributes:
        directory: Where it is.
        config: `config.json`, as decoded.
        shards: The headers of its safetensors files by name.
        index: `model.safetensors.index.json`, as decoded, where there are several files.
    """

    directory: Path
    config: dict[str, Any]
    shards: Mapping[str, Header]
    index: dict[str, Any] | None

    def entries(self) -> dict[str, Entry]:
        """All tensors by key."""
        return {entry.name: entry for shard in self.shards.values() for entry in shard.entries}


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read configuration, index and headers of a model directory, as `save_pretrained` writes it.

    Raises:
        AdapterError: No such directory, no safetensors in it, or something is damaged.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise AdapterError(f"{directory} {what}; pass the directory of a base model")
    if not (directory / CONFIG_NAME).is_file():
        raise AdapterError(
            f"{directory} holds no {CONFIG_NAME}; pass a model directory written by save_pretrained"
        )
    config = read_json(directory / CONFIG_NAME, infinity=True)
    index, names = None, [SINGLE_NAME]
    if not (directory / SINGLE_NAME).is_file():
        index = _read_index(directory)
        names = sorted(set(index["weight_map"].values()))
    shards: dict[str, Header] = {}
    places: dict[str, str] = {}
    for name in names:
        if not (directory / name).is_file():
            raise AdapterError(f"{directory / name} is missing; download the model again")
        with open(directory / name, "rb") as file:
            shards[name] = read_header(directory / name, file)
        for entry in shards[name].entries:
            if entry.name in places:
                raise AdapterError(
                    f"{directory} holds {entry.name} twice, in {places[entry.name]} and {name}; "
                    "download the model again"
                )
            places[entry.name] = name
    for key, name in (index or {}).get("weight_map", {}).items():
        if places.get(key) != name:
            raise AdapterError(
                f"{directory / INDEX_NAME} places {key} in {name}, which does not hold it; "
                "download the model again"
            )
    return Checkpoint(directory, config, shards, index)


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX_NAME
    if not path.is_file():
        if pickles := sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES):
            raise AdapterError(
                f"{directory} holds its weights as a pickle ({pickles[0]}), which can run any "
                "program when read; load it where you trust it and save it again with "
                "save_pretrained"
            )
        raise AdapterError(
            f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; pass the directory of a "
            "base model"
        )
    return checked_index(path)


def check_no_adapter(directory: Path) -> None:
    """Raise `AdapterError` if a model directory also holds an adapter.

    Args:
        directory: A model directory.
    """
    if (directory / ADAPTER_CONFIG_NAME).is_file() and (directory / CONFIG_NAME).is_file():
        raise AdapterError(
            f"{directory} holds an adapter beside the model ({ADAPTER_CONFIG_NAME}), which "
            "transformers loads with it; move the adapter's files to a directory of their own"
        )


def brought_tokenizer(
    model: Path, adapters: Sequence[Path]
) -> tuple[dict[str, Path | None], list[str]]:
    """The tokenizer and chat template that were saved beside an adapter, if they are new.

    Args:
        model: The base model's directory.
        adapters: Directories of adapters; the first one with a new tokenizer counts.

    Returns:
        Files to take, by name, None for a file of the base that has no place beside them; and
        what the user should know.
    """
    base, taken, notes = _tokenizer_files(model), {}, []
    first: Path | None = None
    for directory in adapters:
        files = _tokenizer_files(directory)
        if all(name in base and _same(path, base[name]) for name, path in files.items()):
            continue
        if first is None:
            first, taken = directory, dict(files)
            if "tokenizer_config.json" in files and files.keys() & _VOCABULARIES:
                taken = dict.fromkeys(base) | taken
            notes.append(
                f"tokenizer files are those saved beside {directory}, not the base's: "
                f"{', '.join(sorted(files))}"
            )
        elif any(name not in taken or not _same(path, taken[name]) for name, path in files.items()):
            notes.append(f"the tokenizer files beside {directory} differ and are not used")
    return taken, notes


def copy_other_files(source: Path, target: Path, tokenizer: Mapping[str, Path | None]) -> None:
    """Copy tokenizer, generation config, licence and the like; links are followed.

    Args:
        source: The base model's directory.
        target: The merged model's.
        tokenizer: Files in place of the base's, as `brought_tokenizer` gives them.
    """
    for path in sorted(source.iterdir()):
        if path.name in _FOLDERS and path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        elif path.is_file() and not path.name.startswith(".") and not path.name.endswith(_LEFT_OUT):
            shutil.copyfile(path, target / path.name)
    for name, path in tokenizer.items():
        if path is None:
            (target / name).unlink(missing_ok=True)
        else:
            shutil.copyfile(path, target / name)


def _tokenizer_files(directory: Path) -> dict[str, Path]:
    names = [name for name in _TOKENIZER_NAMES if os.path.lexists(directory / name)]
    return {name: checked_path(directory, name) for name in names}


def _same(path: Path, other: Path | None) -> bool:
    return other is not None and path.read_bytes() == other.read_bytes()


def write_config(
    checkpoint: Checkpoint,
    target: Path,
    dtype: torch.dtype | None,
    vocabulary: tuple[int, int] | None = None,
    *,
    heads_differ: bool,
) -> None:
    """Write `config.json` with the merged model's dtype, vocabulary and ties, where they are new.

    Args:
        checkpoint: The base model.
        target: The merged model's directory.
        dtype: Its dtype; None for the base's.
        vocabulary: The number of tokens before and after, if they differ.
        heads_differ: Whether its head is not its embedding.
    """
    config = json.loads(json.dumps(checkpoint.config))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        if vocabulary and part.get("vocab_size") == vocabulary[0]:
            part["vocab_size"] = vocabulary[1]
        if heads_differ and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if dtype is not None:
            part |= {k: dtype_name(dtype) for k in _DTYPES if isinstance(part.get(k), str)}
    if dtype is not None and "torch_dtype" not in config:
        config["dtype"] = dtype_name(dtype)
    _write_json(target / CONFIG_NAME, config)


def write_index(checkpoint: Checkpoint, target: Path, places: Mapping[str, str], size: int) -> None:
    """Write the index of a model in several files: the file of every tensor, bytes of them all."""
    if checkpoint.index is not None:
        metadata = dict(checkpoint.index.get("metadata") or {}) | {"total_size": size}
        index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
        _write_json(target / INDEX_NAME, index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")  # as transformers does
