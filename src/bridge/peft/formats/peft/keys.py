"""The keys of adapter files, PEFT's own and those that other loops leave: module and matrix.

base_model.model.….q_proj.lora_A.weight   as PEFT saves it
….q_proj.lora_A.default.weight            as in a live PEFT model, with the adapter's name
….q_proj.lora_a.weight                    ours (`adapter_state_dict`), Automodel's
….embed_tokens.lora_embedding_A           an embedding's, as PEFT saves it
….embed_tokens.token_adapter.trainable_tokens_delta   new values of some rows of an embedding
….self_attn.base_layer.out_proj.lora_A.weight   the output's, inside the wrapper of an attention
….q_proj.lora_magnitude_vector            DoRA's magnitude; ours is ….lora_magnitude.weight
….q_proj[.adapter].linear_in.weight       of the layers in version 0.2 of Megatron-Bridge

Keys are cut at their ends only, so modules may be called `lora_A`, `weight` or `base_model`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.peft.kernels import Kernel, flattened
from bridge.peft.model.walk import clean_fqn, some_names

KEY_PREFIX = "base_model.model."
MAX_NAME_LENGTH = 1_000
#: What stands before the names of all modules, or does not.
PREFIXES = ("module.", KEY_PREFIX)
_SPELLINGS = tuple(
    re.compile(
        rf"(?P<fqn>.+?){end}" + (r"(?(embedding)|\.weight)" if "embedding" in end else r"\.weight")
    )
    for end in (
        r"\.lora_(?P<embedding>embedding_)?(?P<half>[AB])",
        r"\.lora_(?P<embedding>embedding_)?(?P<half>[AB])\.(?P<adapter>[^.]+)",
        r"\.lora_(?P<half>[ab])",
        r"(?:\.adapter)?\.linear_(?P<half>in|out)",
    )
)
#: DoRA's magnitude as PEFT saves it, as in a live PEFT model, and ours.
_MAGNITUDE = re.compile(r"(?P<fqn>.+?)\.lora_magnitude(?:_vector(?:\.[^.]+)??)?(?:\.weight)?")
_LETTERS = {"in": "A", "out": "B"}
#: In the keys of adapters that compute something else, and what that is.
_OTHER_KINDS = {
    ".lora_B.bias": "a bias on B",
}
#: Between the name of an `nn.MultiheadAttention` and its output projection inside PEFT's wrapper.
ATTENTION_OUTPUT = ".base_layer.out_proj"
#: Modules that may be one and the same matrix, by the last component of their names.
_HEADS = ("lm_head", "embed_out", "output_layer", "output", "head", "decoder", "proj_out")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings")
#: New rows, as PEFT saves them and as they are in a live PEFT model.
_TOKEN_ROWS = re.compile(r"(?P<fqn>.+?)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
#: Levels of PEFT's wrapper around an embedding with such rows.
_TOKEN_LEVELS = (".token_adapter.base_layer.", ".token_adapter.", ".original_module.")
_COPY, _ORIGINAL = ".modules_to_save.", ".original_module."


def config_name(fqn: str, adapted: Container[str]) -> str:
    """The name by which a config means a module: for an attention's output, the attention's.

    Args:
        fqn: The module's name in the keys.
        adapted: All such names; an attention's output is never adapted without its input.
    """
    attention = fqn.removesuffix(ATTENTION_OUTPUT)
    return attention if attention in adapted else fqn


class Halves:
    """A and B by module, put together as they come out of a file."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Tensor]] = {}

    def add(self, name: str, half: str, tensor: Tensor, key: str) -> None:
        """Take one of the two matrices.

        Args:
            name: The module.
            half: `"A"` or `"B"`.
            tensor: The matrix.
            key: Its key in the file, for messages.

        Raises:
            AdapterFileError: It is there already, or is not a matrix.
        """
        if half in self._found.setdefault(name, {}):
            raise AdapterFileError(
                f"{key[:80]!r} stands for a matrix that another key has given; save the adapter "
                "again"
            )
        if tensor.dim() != 2 or not tensor.numel():
            raise AdapterFileError(f"{key[:80]!r} is not a matrix; save the adapter again")
        self._found[name][half] = tensor

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each module, of one rank.

        Raises:
            AdapterFileError: One of the two is missing, or they do not fit each other.
        """
        for name, half in self._found.items():
            if len(half) == 1:
                alone = sum(len(other) == 1 for other in self._found.values())
                raise AdapterFileError(
                    f"the file holds only the {next(iter(half))} of {name} ({alone} such modules); "
                    "save the adapter again"
                )
            a, b = half["A"], half["B"]
            if a.shape[0] != b.shape[1]:
                raise AdapterFileError(
                    f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} are not of one rank; save "
                    "the adapter again"
                )
        return {name: (half["A"], half["B"]) for name, half in self._found.items()}


@dataclass(frozen=True)
class Contents:
    """The tensors of an adapter file, sorted.

    Attributes:
        pairs: A and B by module.
        magnitudes: DoRA's, by module.
        embeddings: Those of the modules that are embeddings.
        tokens: New rows of embeddings, by module.
        kernels: How A and B of convolutions are shaped in the file, by module.
        rest: The other tensors, by name in the base model.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    magnitudes: dict[str, Tensor]
    embeddings: set[str]
    tokens: dict[str, Tensor]
    kernels: dict[str, Kernel]
    rest: dict[str, Tensor]


def split_keys(tensors: Mapping[str, Tensor]) -> Contents:
    """Sort the tensors of an adapter file by module.

    Args:
        tensors: By key of the file.

    Raises:
        AdapterFileError: There is no A and B, one of the two is missing, or the keys are those of
            several adapters or of another kind.
    """
    names = _names(tensors)
    _refuse_other_kinds(names.values())
    found = {}
    for spelling in _SPELLINGS:
        found = {key: m for key, name in names.items() if (m := spelling.fullmatch(name))}
        if found:
            break
    else:
        raise AdapterFileError("the file holds no LoRA tensor; save the adapter again")
    adapters = {m.groupdict().get("adapter") for m in found.values()}
    if len(adapters) > 1:
        raise AdapterFileError(
            f"the file holds the adapters {some_names(sorted(map(str, adapters)))}; save one alone"
        )
    halves, kernels = Halves(), {}
    for key, m in found.items():
        letter = _LETTERS.get(m["half"], m["half"].upper())
        if tensors[key].dim() > 2:
            kernels.setdefault(m["fqn"], {})[letter] = tensors[key]
        else:
            halves.add(m["fqn"], letter, tensors[key], key)
    rest = {name: tensors[key] for key, name in names.items() if key not in found}
    rest, tokens = _without_tokens(rest)
    if odd := [fqn for fqn, half in kernels.items() if len(half) == 1]:
        raise AdapterFileError(
            f"one of A and B of {odd[0]} is not a matrix, and not both are kernels of a "
            "convolution; save the adapter again"
        )
    pairs, shapes = halves.pairs(), {}
    for fqn, half in kernels.items():
        a, b, shapes[fqn] = flattened(fqn, half["A"], half["B"])
        pairs[fqn] = a, b
    named = {m["fqn"]: name for name in rest if (m := _MAGNITUDE.fullmatch(name))}
    return Contents(
        pairs,
        {fqn: rest.pop(name) for fqn, name in named.items() if fqn in pairs},
        {m["fqn"] for m in found.values() if _is_of_embedding(m)},
        tokens,
        shapes,
        _trained_copies(rest, adapters.pop()),
    )


def _without_tokens(rest: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors but the new rows of embeddings, and those by module.

    PEFT may save the embedding beside its rows, under one or two names of its wrapper's.
    """
    found = {name: m for name in rest if (m := _TOKEN_ROWS.fullmatch(name))}
    tokens: dict[str, Tensor] = {}
    for name, m in found.items():
        if m["fqn"] in tokens or rest[name].dim() != 2 or not rest[name].numel():
            raise AdapterFileError(
                f"{name[:80]!r} is not a matrix of token rows, or there are two; save the adapter "
                "again"
            )
        tokens[m["fqn"]] = rest[name]
    kept: dict[str, Tensor] = {}
    for name, tensor in rest.items():
        if name in found:
            continue
        own = name
        for level in _TOKEN_LEVELS if found else ():
            own = own.replace(level, ".")
        if own in kept and not torch.equal(kept[own], tensor):
            raise AdapterFileError(
                f"the file holds two values of {own} that differ; save the adapter again"
            )
        kept[own] = tensor
    return kept, tokens


def _is_of_embedding(key: re.Match[str]) -> bool:
    """Whether a key is that of an embedding's A or B; ours do not say it but by the module."""
    if "embedding" in key.re.groupindex:
        return key["embedding"] is not None
    return is_embedding(f"{key['fqn']}.weight")


def is_head(name: str) -> bool:
    """Whether a tensor may be an output head's.

    Args:
        name: Its key.
    """
    return _module_name(name) in _HEADS


def is_embedding(name: str) -> bool:
    """Whether a tensor may be an input embedding's.

    Args:
        name: Its key.
    """
    return _module_name(name) in _EMBEDDINGS


def _names(keys: Iterable[str]) -> dict[str, str]:
    """The name behind each key: without the levels of wrappers, and without PEFT's prefix."""
    names = {key: clean_fqn(key) for key in keys}
    for prefix in PREFIXES:
        odd = [name for name in names.values() if not name.startswith(prefix)]
        if not odd:
            names = {key: name.removeprefix(prefix) for key, name in names.items()}
        elif prefix == KEY_PREFIX and len(odd) < len(names):
            raise AdapterFileError(
                f"the file holds {odd[0][:80]!r}, which is not a name below {KEY_PREFIX!r} like "
                "the others; save the adapter again"
            )
    for key, name in names.items():
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME_LENGTH:
            raise AdapterFileError(f"{key[:80]!r} is not a tensor's name; save the adapter again")
    if len(set(names.values())) < len(names):
        raise AdapterFileError("two keys of the file are one name; save the adapter again")
    return names


def _refuse_other_kinds(names: Iterable[str]) -> None:
    for name in names:
        for mark, kind in _OTHER_KINDS.items():
            if mark in name:
                raise AdapterFileError(
                    f"{name.partition(mark)[0]} is adapted by {kind}, which is not supported yet; "
                    "merge the adapter with the tool that made it"
                )


def _trained_copies(rest: dict[str, Tensor], adapter: str | None) -> dict[str, Tensor]:
    """The tensors saved whole, by name in the base model.

    Beside the trained copy of a module PEFT may save the original, and the copy once more.
    """
    whole = dict(rest)
    for name, tensor in rest.items():
        fqn, found, inner = name.rpartition(_COPY)
        if not found:
            continue
        inner = inner.removeprefix(f"{adapter}.")
        del whole[name]
        whole.pop(f"{fqn}{_ORIGINAL}{inner}", None)
        own = f"{fqn}.{inner}"
        if own in whole and not torch.equal(whole[own], tensor):
            raise AdapterFileError(
                f"the file holds two values of {own} that differ; save the adapter again"
            )
        whole[own] = tensor
    return whole


def _module_name(key: str) -> str:
    """The last component of the module that a tensor belongs to: `q_proj` of `….q_proj.weight`."""
    return key.rpartition(".")[0].rpartition(".")[2]
