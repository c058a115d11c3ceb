"""An adapter as it lies on disk, without a model: read, checked, written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from bridge.peft.branch.kinds import EmbeddingAdapter
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.files.adapter_tensors import read_adapter_tensors
from bridge.peft.formats.files.atomic import COMMITTED, write_files
from bridge.peft.formats.files.safetensors_file import serialize
from bridge.peft.formats.files.untrusted import (
    CONFIG_NAME,
    EXTRA_NAME,
    TENSORS_NAME,
    checked_path,
    json_bytes,
    read_json,
    reading,
)
from bridge.peft.formats.peft.config import PeftConfig, parse_config, scale_of
from bridge.peft.formats.peft.consistency import check_adapter
from bridge.peft.formats.peft.extra import check_extra, read_extra
from bridge.peft.formats.peft.fields import check_method
from bridge.peft.formats.peft.kernels import Kernel, unflattened
from bridge.peft.formats.peft.keys import KEY_PREFIX, config_name, split_keys
from bridge.peft.formats.peft.target_parameters import flattened, unwrapped, wrapped

#: The ends of the keys of A and B: of an embedding, and of everything else.
_SUFFIXES = {True: EmbeddingAdapter.peft_keys, False: LoRAMixin.peft_keys}
_MAGNITUDE = ".lora_magnitude_vector"
#: Where PEFT puts the base's own parameters of an adapted module.
_BASE = ".base_layer."


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A PEFT adapter directory, read and checked.

    Attributes:
        config: `adapter_config.json`, as decoded.
        tensors: By fully qualified name: A of shape (rank, in_features) and B of shape
            (out_features, rank); of a parameter that holds several matrices both are stacks,
            (experts, …).
        magnitudes: By fully qualified name: DoRA's, (out_features,); empty without DoRA.
        extra: `bridge_adapter.json`: what a PEFT config has no field for; empty without that file.
        whole: Tensors saved whole (`modules_to_save`, `bias`), by their name in the base model.
            Beside an adapted output head PEFT also saves the base's weight of it.
        names_in_file: The file's name of each module that has another in the model.
        parameters: Which of the names in `tensors` are those of parameters, not of modules.
        alphas: Alphas that the config does not say, of branches that were put together.
        embeddings: The modules that are embeddings: A is (rank, num_embeddings) and B
            (embedding_dim, rank).
        kernels: How A and B of the convolutions among them are shaped in the file.
        tokens: New rows of embeddings, (count, embedding_dim), in the order of the config's
            indices.
    """

    config: dict[str, Any]
    tensors: dict[str, tuple[Tensor, Tensor]]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    names_in_file: dict[str, str] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    alphas: dict[str, float] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def parsed(self) -> PeftConfig:
        """The config, checked.

        Raises:
            AdapterFileError: It cannot be honoured.
        """
        return parse_config(self.config)

    @cached_property
    def _alphas(self) -> dict[str, float]:
        pattern, default = self.parsed.alpha_pattern, self.parsed.lora_alpha
        names = {fqn: self.name_in_file(fqn) for fqn in self.tensors}
        in_file = {*names.values()}
        found = {f: pattern.value(config_name(n, in_file), default) for f, n in names.items()}
        return found | self.alphas

    @property
    def base_weights(self) -> set[str]:
        """Names in `whole` that are weights of adapted modules: the base's own, not new ones."""
        return self.whole.keys() & set(map(self.weight_name, self.tensors))

    def weight_name(self, fqn: str) -> str:
        """The name of the weight that a module or parameter in `tensors` is adapted in."""
        return fqn if fqn in self.parameters else f"{fqn}.weight"

    def name_in_file(self, fqn: str) -> str:
        """The name that the file has for a module."""
        return self.names_in_file.get(fqn, fqn)

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """The shape (out_features, in_features) of every adapted weight, and of what is whole.

        None for an embedding of which the file has some rows only, and for a parameter.
        """
        adapted: dict[str, tuple[int, ...] | None] = {
            # which way round a parameter lies only its module knows
            self.weight_name(f): None if f in self.parameters else (b.shape[0], a.shape[1])
            for f, (a, b) in self.tensors.items()
        }
        rows = dict.fromkeys(f"{fqn}.weight" for fqn in self.tokens)
        return adapted | rows | {name: tuple(t.shape) for name, t in self.whole.items()}

    @property
    def frozen(self) -> set[str]:
        """Names in `whole` that the config does not name: the base may have other values there."""
        return {name for name in self.whole if not _is_trained(name, self.parsed)}

    def rank(self, fqn: str) -> int:
        """The rank of one module: that of its tensors."""
        return self.tensors[fqn][0].shape[-2]

    def token_indices(self, fqn: str) -> tuple[int, ...]:
        """The tokens that the new rows of one embedding are of, in the order of the rows."""
        named = self.parsed.trainable_token_indices
        ends = [end for end in named if end and self.name_in_file(fqn).endswith(end)]
        return named.get(ends[0] if ends else "", ())

    def alpha(self, fqn: str) -> float:
        """The alpha of one module, the config's pattern applied."""
        return self._alphas[fqn]

    def scale(self, fqn: str) -> float:
        """The factor before B A x of one module."""
        return scale_of(self.alpha(fqn), self.rank(fqn), self.parsed.use_rslora)


def read_adapter(directory: str | Path) -> AdapterFile:
    """Read a PEFT LoRA adapter; only JSON and safetensors are opened, never a pickle.

    Args:
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        AdapterFileError: Something is missing, damaged, contradictory or cannot be honoured.
    """
    directory = Path(directory)
    with reading(directory):
        if not directory.is_dir():
            raise AdapterFileError(
                f"{directory} is not an adapter directory; pass one that holds {CONFIG_NAME}"
            )
        warn_if_interrupted(directory)
        config = read_json(checked_path(directory, CONFIG_NAME))
        check_method(config)
        extra = read_extra(directory)
        tensors = read_adapter_tensors(directory)
    return adapter_from(config, extra, tensors)


def warn_if_interrupted(directory: Path) -> None:
    """Say where the files are read from after a crash between a commit and the moves.

    Args:
        directory: An adapter directory.
    """
    if (directory / COMMITTED).is_dir():
        warnings.warn(
            f"a save into {directory} was interrupted; its files in {COMMITTED} are read, and "
            "the next save puts them in their places",
            stacklevel=3,
        )


def adapter_from(
    config: dict[str, Any], extra: dict[str, Any], tensors: Mapping[str, Tensor]
) -> AdapterFile:
    """An adapter out of the decoded contents of its files.

    Args:
        config: `adapter_config.json`.
        extra: `bridge_adapter.json`.
        tensors: `adapter_model.safetensors`, by key.

    Raises:
        AdapterFileError: They do not make an adapter, or one that cannot be honoured.
    """
    adapter = AdapterFile(config=config, tensors={}, extra=extra)
    parsed = adapter.parsed  # raises: a config of another method explains strange keys
    contents = split_keys(tensors)
    check_extra(extra)
    found, parameters = unwrapped(contents.pairs, parsed, extra)
    adapter.tensors.update(found)
    adapter.parameters.update(parameters)
    adapter.magnitudes.update(contents.magnitudes)
    adapter.embeddings.update(contents.embeddings)
    adapter.tokens.update(contents.tokens)
    adapter.kernels.update(contents.kernels)
    adapter.whole.update(_whole_tensors(contents.rest, contents.pairs))
    check_adapter(adapter)
    return adapter


def check_new(directory: str | Path) -> None:
    """Raise `AdapterFileError` unless a directory is not there yet, or empty.

    Args:
        directory: Where an adapter is to be written.
    """
    with reading(Path(directory)):
        is_new = not os.path.lexists(directory)
        if not is_new and (not os.path.isdir(directory) or os.listdir(directory)):
            raise AdapterFileError(
                f"{directory} already exists and is not empty; pass a new directory as the output"
            )


def write_adapter(adapter: AdapterFile, directory: str | Path) -> Path:
    """Write a PEFT LoRA adapter, all files or none.

    Args:
        adapter: What to write.
        directory: Created if missing; an adapter in it is replaced.

    Returns:
        The directory.

    Raises:
        AdapterFileError: The directory cannot be written to; what it held is still there.
    """
    directory = Path(directory)
    tensors = {_whole_key(name, adapter): tensor for name, tensor in adapter.whole.items()}
    places = wrapped(fqn for fqn in adapter.tensors if fqn in adapter.parameters)
    for fqn, pair in adapter.tensors.items():
        if kernel := adapter.kernels.get(fqn):
            pair = unflattened(*pair, kernel)
        pair = flattened(*pair) if fqn in places else pair
        for suffix, tensor in zip(_SUFFIXES[fqn in adapter.embeddings], pair, strict=True):
            tensors[f"{KEY_PREFIX}{places.get(fqn, fqn)}.{suffix}"] = tensor
    for fqn, rows in adapter.tokens.items():
        tensors[f"{KEY_PREFIX}{fqn}.token_adapter.trainable_tokens_delta"] = rows
    for fqn, tensor in adapter.magnitudes.items():
        tensors[f"{KEY_PREFIX}{fqn}{_MAGNITUDE}"] = tensor
    write_files(
        directory,
        {
            TENSORS_NAME: serialize(tensors),
            CONFIG_NAME: json_bytes(adapter.config),
            EXTRA_NAME: json_bytes(adapter.extra),
        },
    )
    return directory


def _whole_tensors(rest: Mapping[str, Tensor], adapted: Collection[str]) -> dict[str, Tensor]:
    """What is neither A nor B, by name in the base model."""
    whole: dict[str, Tensor] = {}
    for key, tensor in rest.items():
        fqn, found, last = key.rpartition(_BASE)
        name = f"{fqn}.{last}" if found and fqn in adapted else key
        if ".lora_" in name or name in whole:
            raise AdapterFileError(
                f"{TENSORS_NAME} holds {key!r}, which is not a name in an adapter; save it again"
            )
        whole[name] = tensor
    return whole


def _is_trained(name: str, config: PeftConfig) -> bool:
    """Whether the config accounts for a tensor that is neither A nor B."""
    if config.bias != "none" and name.endswith(".bias"):
        return True
    parts = name.split(".")
    owners = [".".join(parts[:i]) for i in range(1, len(parts))]
    # PEFT takes the ends of names as they are, dots or not
    return any(owner.endswith(saved) for owner in owners for saved in config.modules_to_save)


def _whole_key(name: str, adapter: AdapterFile) -> str:
    fqn, _, last = name.rpartition(".")
    if fqn in adapter.tokens:
        return f"{KEY_PREFIX}{fqn}.original_module.{last}"
    return KEY_PREFIX + (f"{fqn}{_BASE}{last}" if fqn in adapter.tensors else name)
