"""Which tensors of a checkpoint an adapter changes, and how."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bridge.peft.errors import AdapterError
from bridge.peft.formats.files.safetensors_file import FLOATING, Entry
from bridge.peft.formats.peft import AdapterFile
from bridge.peft.merging.directory.checkpoint import Checkpoint
from bridge.peft.merging.rounding import Term

#: Modules that may be one and the same matrix, by the last component of their names.
_HEADS = ("lm_head", "embed_out", "output_layer", "output", "head", "decoder", "proj_out")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings")


@dataclass(frozen=True)
class Edit:
    """What becomes of one tensor.

    Attributes:
        fqn: The adapted module, or the replaced tensor.
        terms: A, B and scale of each adapter to add; empty for a replacement.
        transposed: The tensor is stored as (in_features, out_features).
        replacement: The values that stand in for it.
    """

    fqn: str
    terms: tuple[Term, ...] = ()
    transposed: bool = False
    replacement: Tensor | None = None


@dataclass(frozen=True)
class Edits:
    """All changes to a checkpoint.

    Attributes:
        by_key: The changed tensors.
        untied: New tensors and the tied one that each starts from.
        heads_differ: The merged model's head is not its embedding, so its config must say so.
    """

    by_key: Mapping[str, Edit]
    untied: Mapping[str, str]
    heads_differ: bool


def plan_edits(
    checkpoint: Checkpoint, adapters: Sequence[tuple[AdapterFile, float]], *, untie: bool
) -> Edits:
    """Find the checkpoint's tensors that the adapters change.

    Args:
        checkpoint: The base model.
        adapters: Each with its weight in the sum.
        untie: Give a tied head a tensor of its own instead of refusing.

    Raises:
        AdapterError: A module is not in the checkpoint, has another shape, is quantised or tied.
    """
    entries = checkpoint.entries()
    whole = _whole_tensors(adapters)
    shapes = {f"{fqn}.weight": shape for fqn, shape in _shapes(adapters).items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in whole.items()}
    ties = _tied_heads(checkpoint, entries, shapes)
    if ties and not untie:
        name, source = next(iter(ties.items()))
        raise AdapterError(
            f"{name} is tied to {source}, which a merge would change too; --untie gives it values "
            "of its own"
        )
    keys = _keys([name for name in shapes if name not in ties], entries)
    found = {name: entries.get(keys.get(name, name)) or entries[ties[name]] for name in shapes}
    any_turned = any(_is_turned(found[name], shapes[name]) for name in shapes if name not in whole)
    edits: dict[str, Edit] = {}
    for name, entry in found.items():
        key = keys.get(name, name)
        if name in whole:
            edits[key] = _replacement(checkpoint, name, entry, whole[name])
        else:
            edits[key] = _edit(name.removesuffix(".weight"), entry, adapters, any_turned=any_turned)
    return Edits(
        edits,
        untied={name: source for name, source in ties.items() if name not in entries},
        heads_differ=any(_module_name(key) in _HEADS for key in edits),
    )


def _shapes(adapters: Sequence[tuple[AdapterFile, float]]) -> dict[str, tuple[int, ...]]:
    """(out_features, in_features) of every adapted module, the same in all adapters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter, _ in adapters:
        for fqn, (a, b) in adapter.tensors.items():
            shape = _shape(a, b)
            if shapes.setdefault(fqn, shape) != shape:
                raise AdapterError(
                    f"{fqn} is {shapes[fqn]} in one adapter and {shape} in another; only adapters "
                    "of the same base can be summed"
                )
    return shapes


def _whole_tensors(adapters: Sequence[tuple[AdapterFile, float]]) -> dict[str, Tensor]:
    for adapter, weight in adapters:
        if adapter.whole and (len(adapters) > 1 or weight != 1):
            raise AdapterError(
                f"an adapter brings {next(iter(adapter.whole))} as a whole, which cannot be "
                "weighted or summed; merge it alone, with weight 1"
            )
        if names := sorted(adapter.base_weights):
            raise AdapterError(
                f"an adapter brings {names[0]} as a whole and an update of it; if it was trained "
                "on this base, save it in PEFT with save_embedding_layers=False"
            )
    return dict(adapters[0][0].whole)


def _edit(
    fqn: str, entry: Entry, adapters: Sequence[tuple[AdapterFile, float]], *, any_turned: bool
) -> Edit:
    if entry.dtype not in FLOATING:
        raise _quantised(fqn, entry.dtype)
    holders = [(adapter, weight) for adapter, weight in adapters if fqn in adapter.tensors]
    terms = tuple((*adapter.tensors[fqn], adapter.scale(fqn) * w) for adapter, w in holders)
    shape = _shape(terms[0][0], terms[0][1])
    if entry.shape not in (shape, shape[::-1]):
        got = "×".join(str(n) for n in entry.shape)
        raise AdapterError(
            f"{fqn} is {shape[0]}×{shape[1]} (out×in) in the adapter and {got} in the checkpoint; "
            "merge the adapter into the model that it was trained on"
        )
    transposed = entry.shape != shape
    if shape[0] == shape[1]:
        transposed = any(adapter.parsed.fan_in_fan_out for adapter, _ in holders)
        if any_turned and not transposed:
            raise AdapterError(
                f"{fqn} is square, and other weights are stored transposed without the adapter's "
                "config saying so (fan_in_fan_out); load model and adapter in Python, and "
                "merge(model)"
            )
    return Edit(fqn, terms, transposed)


def _is_turned(entry: Entry, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is stored as (in, out), as its shape shows unless it is square."""
    return entry.shape == shape[::-1] != shape


def _shape(a: Tensor, b: Tensor) -> tuple[int, ...]:
    return b.shape[0], a.shape[1]


def _replacement(checkpoint: Checkpoint, name: str, entry: Entry, tensor: Tensor) -> Edit:
    if tuple(tensor.shape) != entry.shape or entry.dtype not in FLOATING:
        raise AdapterError(
            f"{name} is {list(tensor.shape)} in the adapter and {list(entry.shape)} "
            f"({entry.dtype}) in the checkpoint; merge it into the model that it was trained on"
        )
    if _module_name(name) in _EMBEDDINGS and _tie_flag(checkpoint.config) is not False:
        raise AdapterError(
            f"the adapter brings a new {name}, which may be tied to the output head; load the "
            "model and the adapter in Python, merge(model) and save_pretrained"
        )
    return Edit(name, replacement=tensor)


def _tied_heads(
    checkpoint: Checkpoint, entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The changed output heads that are the embedding too, with the embedding's key."""
    flag = _tie_flag(checkpoint.config)
    found: dict[str, str] = {}
    for name, shape in shapes.items():
        if _module_name(name) not in _HEADS or flag is False or (name in entries and not flag):
            continue
        same = [e.name for e in entries.values() if e.shape == shape and _is_embedding(e)]
        if same:
            found[name] = same[0]
    return found


def _tie_flag(config: Mapping[str, Any]) -> bool | None:
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return part["tie_word_embeddings"]
    return None


def _is_embedding(entry: Entry) -> bool:
    return entry.name.endswith(".weight") and _module_name(entry.name) in _EMBEDDINGS


def _module_name(key: str) -> str:
    """The last component of the module that a tensor belongs to: `q_proj` of `….q_proj.weight`."""
    return key.rpartition(".")[0].rpartition(".")[2]


def _keys(names: Sequence[str], entries: Mapping[str, Entry]) -> dict[str, str]:
    """The checkpoint's key for each name: the name itself, or with another beginning.

    A checkpoint of the inner model lacks the outer model's prefix (`transformer.h.0…` is `h.0…`),
    or has one too many; the ends of all names must then agree under one and the same exchange.
    """
    keys = {name: name for name in names if name in entries}
    rest = [name for name in names if name not in keys]
    if not rest:
        return keys
    for cut in range(len(rest[0].split("."))):
        old = ".".join(rest[0].split(".")[:cut])
        renamed = [
            {name: _exchange(name, old, new) for name in rest}
            for new in _beginnings(_exchange(rest[0], old, ""), entries)
            if all(_exchange(name, old, new) in entries for name in rest)
        ]
        if len(renamed) > 1:
            raise AdapterError(
                f"{rest[0]} may be any of {', '.join(sorted(r[rest[0]] for r in renamed))} in the "
                "checkpoint; load the model and the adapter in Python, and merge(model)"
            )
        if renamed and not set(renamed[0].values()) & set(keys):
            return keys | renamed[0]
    raise _not_found(rest, len(names), entries)


def _beginnings(end: str, entries: Iterable[str]) -> list[str]:
    return [
        key.removesuffix(end).removesuffix(".")
        for key in entries
        if key == end or key.endswith(f".{end}")
    ]


def _exchange(name: str, old: str, new: str) -> str:
    """`name` with its beginning `old` exchanged for `new`; unchanged if it begins otherwise."""
    if old and not name.startswith(f"{old}."):
        return name
    end = name[len(old) + 1 :] if old else name
    return f"{new}.{end}" if new else end


def _not_found(missing: Sequence[str], count: int, entries: Collection[str]) -> AdapterError:
    for name in missing:
        if f"{name.removesuffix('.weight')}.qweight" in entries:
            return _quantised(name.removesuffix(".weight"), "packed")
    some = ", ".join(name.removesuffix(".weight") for name in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return AdapterError(
        f"the checkpoint holds no weight for {some}{more} ({len(missing)} of {count}); merge the "
        "adapter into the model that it was trained on, or, if transformers renames the weights "
        "on loading, load both in Python, merge(model) and save_pretrained"
    )


def _quantised(fqn: str, dtype: str) -> AdapterError:
    wanted = ", ".join(FLOATING)
    return AdapterError(
        f"{fqn} is quantised in the checkpoint ({dtype}, not one of {wanted}); merge into the "
        "unquantised base model"
    )
