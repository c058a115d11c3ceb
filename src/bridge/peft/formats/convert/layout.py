"""The attention layout of a Llama or Qwen type model: what fusing and permuting rows needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.peft.errors import AdapterError, AdapterFileError

#: Model types of transformers whose heads torchtune stores with interleaved rotary halves.
_INTERLEAVED = frozenset(("llama", "mistral", "gemma", "gemma2"))
_MAX = 1_000_000
_MAX_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """How many heads of which size.

    Attributes:
        heads: Query heads.
        groups: Key (and value) heads; each serves `heads / groups` query heads.
        head_dim: Rows of one head.
        interleaved: Whether torchtune interleaves the rotary halves of q and k for this model
            (Llama) or keeps them as transformers does (Qwen).
        layers: Number of layers, if known.

    Raises:
        AdapterError: The numbers do not fit each other.
    """

    heads: int
    groups: int
    head_dim: int
    interleaved: bool = True
    layers: int | None = None

    def __post_init__(self) -> None:
        numbers = (self.heads, self.groups, self.head_dim)
        if not all(type(n) is int and 0 < n < _MAX for n in numbers) or self.heads % self.groups:
            raise AdapterError(
                f"{numbers!r:.80} (heads, query groups, rows of a head) is not an "
                "attention layout; the groups must divide the heads"
            )
        layers = 1 if self.layers is None else self.layers
        if type(layers) is not int or not 0 < layers <= _MAX_LAYERS:
            raise AdapterError(
                f"{layers!r:.80} is not a number of layers; pass the model's directory"
            )
        if not isinstance(self.interleaved, bool):
            raise AdapterError(f"interleaved must be true or false, got {self.interleaved!r:.80}")

    def rows(self, part: str) -> int:
        """Output features of `"q_proj"`, `"k_proj"` or `"v_proj"`."""
        return self.head_dim * (self.heads if part == "q_proj" else self.groups)

    @classmethod
    def from_dict(cls, values: Any) -> AttentionLayout:
        """The layout out of a file.

        Raises:
            AdapterFileError: It is not one.
        """
        try:
            layout = cls(**values)
        except (TypeError, AdapterError) as error:
            raise AdapterFileError(
                f"bridge_adapter.json: layout is {values!r:.80}; pass the model's directory"
            ) from error
        return layout

    @classmethod
    def of_model(cls, model: Path) -> AttentionLayout:
        """The layout of a transformers model, out of its `config.json`.

        Args:
            model: The model's directory, or the file itself.

        Raises:
            AdapterError: There is no such file, or it does not say how many heads there are.
        """
        path = model if model.is_file() else model / "config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise AdapterError(f"cannot read {path}: {error}; pass a model's directory") from error
        if not isinstance(config, dict):
            raise AdapterError(f"{path} holds a {type(config).__name__}; pass a model's directory")
        return cls.of_config(config, str(path))

    @classmethod
    def of_config(cls, config: Mapping[str, Any], where: str = "config") -> AttentionLayout:
        """The layout that a transformers config describes.

        Args:
            config: The decoded config.
            where: Its name, for messages.

        Raises:
            AdapterError: It does not say how many heads there are.
        """
        config = config.get("text_config") or config
        try:
            heads = config["num_attention_heads"]
            return cls(
                heads=heads,
                groups=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                interleaved=config.get("model_type") in _INTERLEAVED,
                layers=config.get("num_hidden_layers"),
            )
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise AdapterError(
                f"{where} does not say num_attention_heads and hidden_size; pass the directory "
                "of a Llama or Qwen type model"
            ) from error


def fuse_qkv(parts: Mapping[str, Tensor], layout: AttentionLayout) -> Tensor:
    """Megatron's fused rows: for each query group its q heads, its k head, its v head.

    Args:
        parts: `q_proj` (heads · head_dim, n), `k_proj` and `v_proj` (groups · head_dim, n).
        layout: The model's.

    Returns:
        ((heads + 2 · groups) · head_dim, n).
    """
    grouped = [
        parts[name].reshape(layout.groups, -1, parts[name].shape[1])
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def split_qkv(fused: Tensor, layout: AttentionLayout) -> dict[str, Tensor]:
    """The way back from `fuse_qkv`.

    Args:
        fused: ((heads + 2 · groups) · head_dim, n).
        layout: The model's.
    """
    per_group = layout.heads // layout.groups
    sizes = [per_group * layout.head_dim, layout.head_dim, layout.head_dim]
    pieces = fused.reshape(layout.groups, sum(sizes), -1).split(sizes, dim=1)
    names = ("q_proj", "k_proj", "v_proj")
    return {name: p.flatten(0, 1) for name, p in zip(names, pieces, strict=True)}


def interleave_halves(rows: Tensor, head_dim: int) -> Tensor:
    """From transformers' order of a head's rows (first half, second half) to torchtune's (in turn).

    Args:
        rows: (n_heads · head_dim, n).
        head_dim: Rows of one head.
    """
    n = rows.shape[1]
    return rows.reshape(-1, 2, head_dim // 2, n).transpose(1, 2).reshape(-1, n)


def part_halves(rows: Tensor, head_dim: int) -> Tensor:
    """The way back from `interleave_halves`.

    Args:
        rows: (n_heads · head_dim, n).
        head_dim: Rows of one head.
    """
    n = rows.shape[1]
    return rows.reshape(-1, head_dim // 2, 2, n).transpose(1, 2).reshape(-1, n)
