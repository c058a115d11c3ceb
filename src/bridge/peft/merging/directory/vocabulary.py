"""Input embedding and output head of a checkpoint: tied, replaced, of another vocabulary."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from bridge.peft.errors import AdapterError
from bridge.peft.formats.files.safetensors_file import Entry
from bridge.peft.formats.model_directory import Checkpoint
from bridge.peft.formats.peft.keys import is_embedding, is_head


def embedding_of(whole: Mapping[str, Tensor]) -> Tensor | None:
    """The values of the input embedding among tensors saved whole, if they are there.

    Args:
        whole: By name.
    """
    names = [name for name in whole if is_embedding(name)]
    return whole[names[0]] if len(names) == 1 else None


def heads_alike(whole: Mapping[str, Tensor]) -> set[str]:
    """The heads saved whole that hold what the embedding saved beside them holds: tied ones.

    Args:
        whole: By name.
    """
    embedding = embedding_of(whole)
    return {
        name
        for name, tensor in whole.items()
        if is_head(name) and embedding is not None and torch.equal(tensor, embedding)
    }


def is_stored(name: str, entries: Collection[str]) -> bool:
    """Whether a tensor has a key of its own, perhaps with another beginning.

    Args:
        name: Its name in the adapter.
        entries: The keys.
    """
    return any(f".{key}".endswith(f".{name}") or name.endswith(f".{key}") for key in entries)


def tied_heads(
    checkpoint: Checkpoint, entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The changed output heads that are the embedding too, with the embedding's key.

    Args:
        checkpoint: The base model.
        entries: Its tensors.
        shapes: Of the changed ones.
    """
    flag = _tie_flag(checkpoint.config)
    embeddings = [
        entry
        for entry in entries.values()
        if entry.name.endswith(".weight") and is_embedding(entry.name)
    ]
    found: dict[str, str] = {}
    for name, shape in shapes.items():
        if is_head(name) and (flag or (flag is None and name not in entries)):
            if same := [entry.name for entry in embeddings if entry.shape[1:] == shape[1:]]:
                found[name] = same[0]
    return found


def following_heads(
    checkpoint: Checkpoint, entries: Mapping[str, Entry], embeddings: Collection[str]
) -> dict[str, str]:
    """The output heads that are an adapted embedding too and not adapted, with its key.

    Args:
        checkpoint: The base model.
        entries: Its tensors.
        embeddings: The adapted embeddings.

    Raises:
        AdapterError: There may be one, and its name is not known.
    """
    flag = _tie_flag(checkpoint.config)
    keys = [
        key
        for key in entries
        for fqn in embeddings
        if is_embedding(key) and f".{fqn}.weight".endswith(f".{key}")
    ]
    if flag is False or not keys or any(is_head(key) for key in entries):
        return {}
    tied = _tied_keys(checkpoint.config)
    if tied is None:
        raise AdapterError(
            f"{keys[0]} is adapted and may be tied to the output head, whose name is not known "
            "without transformers; load the model and the adapter in Python, merge(model) and "
            "save_pretrained"
        )
    sources = {head: key for head, source in tied.items() for key in keys if _ends(source, key)}
    return {head: key for head, key in sources.items() if head not in entries}


def _ends(name: str, key: str) -> bool:
    return f".{name}".endswith(f".{key}") or f".{key}".endswith(f".{name}")


def _tied_keys(config: Mapping[str, Any]) -> Mapping[str, str] | None:
    """The tensors of a class of transformers that are another, with that one; None if unknown."""
    names = config.get("architectures")
    try:
        transformers = importlib.import_module("transformers")
        found = getattr(transformers, names[0])._tied_weights_keys  # pyright: ignore
    except (ImportError, AttributeError, TypeError, IndexError):
        return None
    if found is None:
        return {}
    return found if isinstance(found, dict) else None  # a list of names, before version 5


def check_ties(checkpoint: Checkpoint, whole: Mapping[str, Tensor], alike: set[str]) -> None:
    """Raise `AdapterError` for a new embedding whose tied head the adapter says nothing of.

    Args:
        checkpoint: The base model.
        whole: The tensors that the adapter holds in full.
        alike: The heads among them that are the embedding, too.
    """
    if _tie_flag(checkpoint.config) is False or alike:
        return
    names = [name for name in whole if is_embedding(name)]
    if names and not any(is_head(name) for name in whole):
        raise AdapterError(
            f"the adapter brings a new {names[0]}, which may be tied to the output head; load the "
            "model and the adapter in Python, merge(model) and save_pretrained"
        )


def new_vocabulary(
    found: Mapping[str, Entry],
    whole: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    edited: Collection[str],
) -> tuple[int, int] | None:
    """How many tokens there were and are, where embedding or head have other rows.

    Args:
        found: The base's entry of each changed tensor.
        whole: The tensors that the adapter holds in full.
        entries: All entries of the base.
        edited: Keys of those that change.

    Raises:
        AdapterError: Something that counts tokens would keep the old number.
    """
    sizes = {
        (entry.shape[0], whole[name].shape[0])
        for name, entry in found.items()
        if name in whole and tuple(whole[name].shape) != entry.shape
    }
    if not sizes:
        return None
    old, new = min(sizes)
    left = [
        key
        for key, entry in entries.items()
        if (is_head(key) or is_embedding(key)) and entry.shape[:1] == (old,) and key not in edited
    ]
    if len(sizes) > 1 or left:
        what = f"{left[0]} keeps {old}" if left else "embedding and head differ"
        raise AdapterError(
            f"the adapter brings a vocabulary of {new} tokens instead of {old}, and {what}; load "
            "the model and the adapter in Python, merge(model) and save_pretrained"
        )
    return old, new


def _tie_flag(config: Mapping[str, Any]) -> bool | None:
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return part["tie_word_embeddings"]
    return None
