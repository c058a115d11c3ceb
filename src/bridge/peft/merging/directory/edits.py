"""Which tensors of a checkpoint an adapter changes, and how."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from bridge.peft.errors import AdapterError
from bridge.peft.formats.files.safetensors_file import FLOATING, Entry
from bridge.peft.formats.model_directory import Checkpoint
from bridge.peft.formats.peft import AdapterFile
from bridge.peft.formats.peft.kernels import Kernel
from bridge.peft.formats.peft.keys import is_embedding, is_head
from bridge.peft.formats.peft.places import exchanged
from bridge.peft.merging.directory.quantised import (
    Quantised,
    TrainedOn,
    how_for,
    others_to_quantise,
)
from bridge.peft.merging.directory.vocabulary import (
    check_ties,
    embedding_of,
    following_heads,
    heads_alike,
    is_stored,
    new_vocabulary,
    tied_heads,
)
from bridge.peft.merging.rounding import Term
from bridge.peft.model.walk import some_names

_Adapters = Sequence[tuple[AdapterFile, float]]


@dataclass(frozen=True)
class Edit:
    """What becomes of one tensor.

    Attributes:
        fqn: The adapted module, or the replaced tensor.
        terms: A, B and scale of each adapter to add; empty for a mere replacement.
        transposed: The tensor is stored as (in_features, out_features).
        replacement: The values that stand in for it, or that the terms are added to.
        rows: New values of some rows, and which those are, in ascending order.
        magnitude: What the rows of the sum are rescaled to, by DoRA.
        quantised: How it was quantised when the adapter was trained.
    """

    fqn: str
    terms: tuple[Term, ...] = ()
    transposed: bool = False
    replacement: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None
    magnitude: Tensor | None = None
    quantised: Quantised | None = None


@dataclass(frozen=True)
class Edits:
    """All changes to a checkpoint.

    Attributes:
        by_key: The changed tensors.
        untied: New tensors and the tied one that each starts from.
        heads_differ: The merged model's head is not its embedding, so its config must say so.
        was_tied: Whether they were one in the base.
        vocabulary: The number of tokens before and after, where the adapter brings other ones.
    """

    by_key: Mapping[str, Edit]
    untied: Mapping[str, str]
    heads_differ: bool
    vocabulary: tuple[int, int] | None = None
    was_tied: bool = False


def plan_edits(
    checkpoint: Checkpoint, adapters: _Adapters, base: TrainedOn | None = None, *, untie: bool
) -> Edits:
    """Find the checkpoint's tensors that the adapters change.

    Args:
        checkpoint: The base model.
        adapters: Each with its weight in the sum.
        base: What of it was quantised when they were trained.
        untie: Give a tied head a tensor of its own instead of refusing.

    Raises:
        AdapterError: A module is not in the checkpoint, has another shape, is quantised or tied.
    """
    _check_can_be_summed(adapters)
    entries, whole = checkpoint.entries(), _whole_tensors(adapters)
    alike = heads_alike(whole)
    for name in alike:
        if not is_stored(name, entries):  # the embedding's new values are the head's
            del whole[name]
    shapes = _shapes(adapters) | {name: tuple(tensor.shape) for name, tensor in whole.items()}
    embeddings = frozenset(fqn for adapter, _ in adapters for fqn in adapter.embeddings)
    ties = tied_heads(checkpoint, entries, shapes)
    followers = {} if ties else following_heads(checkpoint, entries, embeddings)
    are_brought = embedding_of(whole) is not None  # both with values of their own
    refused = {k: v for k, v in ties.items() if not (are_brought and k in whole)} | followers
    if refused and not untie:
        head, embedding = next(iter(refused.items()))
        raise AdapterError(
            f"{head} is tied to {embedding}, which a merge would change too; --untie gives it "
            "values of its own"
        )
    stored = [name for name in shapes if name not in ties or is_stored(name, entries)]
    keys = _keys(stored, shapes, entries, whole)
    found = {name: entries.get(keys.get(name, name)) or entries[ties[name]] for name in shapes}
    # a shape shows which way round a tensor is stored, unless it is square
    any_turned = any(
        entry.shape == shapes[name][::-1] != shapes[name]
        for name, entry in found.items()
        if name not in whole and name.removesuffix(".weight") not in embeddings
    )
    edits: dict[str, Edit] = {}
    for name, entry in found.items():
        fqn, edit = name.removesuffix(".weight"), None
        if name in whole:
            edit = _replacement(name, entry, whole[name])
            entry = replace(entry, shape=tuple(whole[name].shape))
        if any(fqn in adapter.tensors for adapter, _ in adapters):
            update = _update(fqn, entry, adapters, any_turned=any_turned)
            how = None if base is None or edit is not None else how_for(base, fqn, entry)
            edit = replace(update, replacement=edit and edit.replacement, quantised=how)
        assert edit is not None
        edits[keys.get(name, name)] = edit
    if base is not None:
        linears = (edit for edit in edits.values() if edit.fqn not in embeddings)
        turned = any(edit.transposed for edit in linears)
        for key, how in others_to_quantise(base, keys, entries):
            if key not in edits:
                edits[key] = Edit(key, transposed=turned, quantised=how)
    check_ties(checkpoint, whole, alike)
    edits |= _token_rows(adapters, entries, edits)
    heads = [name for name in shapes if is_head(name) and name not in alike]
    return Edits(
        edits,
        untied={name: source for name, source in ties.items() if name not in keys} | followers,
        heads_differ=bool(heads or followers),
        was_tied=bool(ties or followers),
        vocabulary=new_vocabulary(found, whole, entries, edits),
    )


def _token_rows(
    adapters: _Adapters, entries: Mapping[str, Entry], edits: Mapping[str, Edit]
) -> dict[str, Edit]:
    """The edits of embeddings of which an adapter brings some rows."""
    found: dict[str, Edit] = {}
    for fqn, rows in adapters[0][0].tokens.items():
        keys = [key for key in entries if _is_end_of(key, f"{fqn}.weight")]
        if len(keys) != 1:
            raise _not_found([fqn], 1, entries)
        edit, tokens = edits.get(keys[0], Edit(fqn)), adapters[0][0].token_indices(fqn)
        base = entries[keys[0]].shape if edit.replacement is None else edit.replacement.shape
        if edit.terms or entries[keys[0]].dtype not in FLOATING or max(tokens) >= base[0]:
            raise AdapterError(
                f"the adapter brings rows of {fqn} for tokens up to {max(tokens)}, and the "
                f"checkpoint holds {base[0]} ({entries[keys[0]].dtype}); load the kind of model "
                "that it was trained on and the adapter in Python, merge(model) and save_pretrained"
            )
        order = torch.tensor(tokens).argsort()
        found[keys[0]] = replace(edit, rows=(rows[order], torch.tensor(tokens)[order]))
    return found


def _is_end_of(key: str, name: str) -> bool:
    return f".{name}".endswith(f".{key}") or f".{key}".endswith(f".{name}")


def _shapes(adapters: _Adapters) -> dict[str, tuple[int, ...]]:
    """(out_features, in_features) of every adapted weight, the same in all adapters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter, _ in adapters:
        for fqn, (a, b) in adapter.tensors.items():
            shape = b.shape[0], a.shape[1]
            known = shapes.setdefault(f"{fqn}.weight", shape)
            if known != shape:
                raise AdapterError(
                    f"{fqn} is {known} in one adapter and {shape} in another; only adapters of "
                    "the same base can be summed"
                )
    return shapes


def _check_can_be_summed(adapters: _Adapters) -> None:
    for adapter, weight in adapters:
        if adapter.magnitudes and (len(adapters) > 1 or weight != 1):
            raise AdapterError(
                "a DoRA adapter rescales the weight that it was trained on, and cannot be weighted "
                "or summed; merge it alone, with weight 1"
            )


def _whole_tensors(adapters: _Adapters) -> dict[str, Tensor]:
    for adapter, weight in adapters:
        brought = [*adapter.whole, *(f"rows of {fqn}" for fqn in adapter.tokens)]
        if brought and (len(adapters) > 1 or weight != 1):
            raise AdapterError(
                f"an adapter brings {brought[0]} as a whole, which cannot be weighted or summed; "
                "merge it alone, with weight 1"
            )
    return dict(adapters[0][0].whole)


def _update(fqn: str, entry: Entry, adapters: _Adapters, *, any_turned: bool) -> Edit:
    if entry.dtype not in FLOATING:
        raise _quantised(fqn, entry.dtype)
    holders = [(adapter, weight) for adapter, weight in adapters if fqn in adapter.tensors]
    terms = tuple((*adapter.tensors[fqn], adapter.scale(fqn) * w) for adapter, w in holders)
    shape = terms[0][1].shape[0], terms[0][0].shape[1]
    for adapter, _ in holders:
        if fqn in adapter.kernels:
            entry = _flat(fqn, entry, adapter.kernels[fqn])
    if entry.shape not in (shape, shape[::-1]):
        got = "×".join(str(n) for n in entry.shape)
        raise AdapterError(
            f"{fqn} is {shape[0]}×{shape[1]} (out×in) in the adapter and {got} in the checkpoint; "
            "merge the adapter into the model that it was trained on"
        )
    is_embedding = fqn in holders[0][0].embeddings
    transposed = is_embedding or entry.shape != shape
    if shape[0] == shape[1] and not is_embedding:
        transposed = any(adapter.parsed.fan_in_fan_out for adapter, _ in holders)
        if any_turned and not transposed:
            raise AdapterError(
                f"{fqn} is square, and other weights are stored transposed without the adapter's "
                "config saying so (fan_in_fan_out); load model and adapter in Python, and "
                "merge(model)"
            )
    return Edit(fqn, terms, transposed, magnitude=holders[0][0].magnitudes.get(fqn))


def _flat(fqn: str, entry: Entry, kernel: Kernel) -> Entry:
    """A convolution's weight as the matrix that B A is an update of."""
    if kernel.groups > 1:
        raise AdapterError(
            f"{fqn} is a convolution of {kernel.groups} groups, and the update mixes them; keep "
            "the adapter unmerged, or leave it out"
        )
    if entry.shape[1:] != kernel.size:
        return entry  # which then does not fit
    return replace(entry, shape=(*entry.shape[:1], prod(kernel.size)))


def _replacement(name: str, entry: Entry, tensor: Tensor) -> Edit:
    shape = tuple(tensor.shape)
    is_resized = (is_head(name) or is_embedding(name)) and shape[1:] == entry.shape[1:]
    if (shape != entry.shape and not is_resized) or entry.dtype not in FLOATING:
        raise AdapterError(
            f"{name} is {list(tensor.shape)} in the adapter and {list(entry.shape)} "
            f"({entry.dtype}) in the checkpoint; merge it into the model that it was trained on"
        )
    return Edit(name, replacement=tensor)


def _keys(
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    entries: Mapping[str, Entry],
    whole: Collection[str],
) -> dict[str, str]:
    """The checkpoint's key for each name: the name itself, or with another beginning.

    A checkpoint of the inner model lacks the outer model's prefix (`transformer.h.0…` is `h.0…`),
    or has one too many; the ends of all names must then agree under one and the same exchange.
    """
    keys = {name: name for name in names if name in entries}
    rest = {name: shapes[name] for name in names if name not in keys}
    known = {key: entry.shape for key, entry in entries.items() if key not in keys}
    found = exchanged(rest, known)
    if len(found) > 1:
        name = next(iter(rest))
        raise AdapterError(
            f"{name} may be any of {some_names(sorted(f[name] for f in found))} in the checkpoint; "
            "load the model and the adapter in Python, and merge(model)"
        )
    if rest and not found:
        if new := [name for name in rest if name in whole]:
            raise AdapterError(
                f"the adapter brings {some_names(new)} in full, which the checkpoint does not "
                "hold under that name; load the kind of model that it was trained on and the "
                "adapter in Python, merge(model) and save_pretrained"
            )
        raise _not_found(rest, len(names), entries)
    return keys | (found[0] if found else {})


def _not_found(missing: Collection[str], count: int, entries: Collection[str]) -> AdapterError:
    fqns = [name.removesuffix(".weight") for name in missing]
    if packed := [fqn for fqn in fqns if f"{fqn}.qweight" in entries]:
        return _quantised(packed[0], "packed")
    return AdapterError(
        f"the checkpoint holds no weight for {some_names(fqns)} ({len(fqns)} of {count}); merge "
        "the adapter into the model that it was trained on, or, if transformers renames or adds "
        "the weights on loading, load both in Python, merge(model) and save_pretrained"
    )


def _quantised(fqn: str, dtype: str) -> AdapterError:
    return AdapterError(
        f"{fqn} is quantised in the checkpoint ({dtype}, not one of {', '.join(FLOATING)}); load "
        "the model and the adapter in Python, merge(model) and save_pretrained"
    )
