"""Where the modules of an adapter file are in a model, or a checkpoint, that names them otherwise.

transformers renames modules from version to version and knows the old names; wrappers leave
beginnings; an adapter of an inner model lacks the outer one's.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from bridge.peft.branch.registry import features, kind_of
from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.keys import PREFIXES
from bridge.peft.model.walk import base_modules, clean_fqn, some_names

#: The shape of a tensor; None where it is not known.
Shape = tuple[int, ...] | None


def placed(adapter: AdapterFile, model: nn.Module) -> AdapterFile:
    """The adapter under the model's own names; what the model does not have keeps its name.

    Args:
        adapter: As it was read.
        model: The model, not wrapped.

    Raises:
        AdapterFileError: A name may mean several modules, or transformers has made another
            parameter of what it means.
    """
    modules = base_modules(model)
    known = _shapes(model, modules)
    wanted: dict[str, Shape] = adapter.shapes()
    names = dict(zip(wanted, _without_wrappers(list(wanted), modules), strict=True))
    if missing := [old for old, name in names.items() if name not in known]:
        transforms = _transforms(model)
        names |= {old: _renamed(names[old], transforms, known) for old in missing}
    rest = {name: wanted[old] for old, name in names.items() if name not in known}
    found = exchanged(rest, {k: s for k, s in known.items() if k not in names.values()})
    if len(found) > 1:
        first = next(iter(rest))
        raise AdapterFileError(
            f"{first} may be any of {some_names(sorted(f[first] for f in found))} in "
            f"{type(model).__name__}; load the adapter into the part that it was trained on"
        )
    if found:
        old, new = next(iter(found[0].items()))
        warnings.warn(
            f"the file calls {old} what is {new} in {type(model).__name__}, {len(rest)} tensors "
            "likewise; names and shapes fit in no other way",
            stacklevel=3,
        )
        names = {old: found[0].get(name, name) for old, name in names.items()}
    if len(set(names.values())) < len(names) or all(old == new for old, new in names.items()):
        return adapter
    new = {fqn: names[adapter.weight_name(fqn)] for fqn in adapter.tensors}
    new |= {fqn: names[f"{fqn}.weight"] for fqn in adapter.tokens}
    fqns = {
        fqn: name if fqn in adapter.parameters else name.removesuffix(".weight")
        for fqn, name in new.items()
    }
    return dataclasses.replace(
        adapter,
        parameters={fqns[fqn] for fqn in adapter.parameters},
        alphas={fqns[fqn]: alpha for fqn, alpha in adapter.alphas.items()},
        tensors={fqns[fqn]: pair for fqn, pair in adapter.tensors.items()},
        magnitudes={fqns[fqn]: tensor for fqn, tensor in adapter.magnitudes.items()},
        whole={names[name]: tensor for name, tensor in adapter.whole.items()},
        names_in_file={n: adapter.name_in_file(old) for old, n in fqns.items()},
        kernels={fqns[fqn]: kernel for fqn, kernel in adapter.kernels.items()},
        tokens={fqns[fqn]: rows for fqn, rows in adapter.tokens.items()},
        embeddings={fqns[fqn] for fqn in adapter.embeddings},
    )


def exchanged(wanted: Mapping[str, Shape], known: Mapping[str, Shape]) -> list[dict[str, str]]:
    """The ways to exchange one and the same beginning of all names so that all are known.

    The shortest beginning counts, and the shapes where several do. The number of a layer is never
    exchanged.

    Args:
        wanted: Names of tensors, with their shapes.
        known: Likewise; a shape may be turned.

    Returns:
        A known name for each; several where the shapes do not decide.
    """
    if not wanted:
        return []
    first = next(iter(wanted))
    parts = first.split(".")
    for cut in range(len(parts) - 1):
        if _has_layer(parts[:cut]):
            return []
        old, end = ".".join(parts[:cut]), ".".join(parts[cut:])
        beginnings = [
            key.removesuffix(end).removesuffix(".")
            for key in known
            if key == end or key.endswith(f".{end}")
        ]
        found = [
            {name: _exchange(name, old, new) for name in wanted}
            for new in beginnings
            if not _has_layer(new.split("."))
            and all(_exchange(name, old, new) in known for name in wanted)
        ]
        if found:
            fitting = [f for f in found if all(_fits(wanted[n], known[k]) for n, k in f.items())]
            return fitting if len(found) > 1 and fitting else found
    return []


def _shapes(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Shape]:
    known: dict[str, Shape] = {f"{fqn}.weight": None for fqn in modules}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known[clean_fqn(name)] = tuple(parameter.shape)
    for fqn, module in modules.items():
        if kind_of(type(module)) is not None:
            known[f"{fqn}.weight"] = features(module)[::-1]
    return known


def _without_wrappers(names: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The names without a beginning of a wrapper that this model is not in."""
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in names) and prefix[:-1] not in modules:
            names = [name.removeprefix(prefix) for name in names]
    return names


def _transforms(model: nn.Module) -> Sequence[Any]:
    """What transformers does to the names of a model's checkpoints."""
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
        return ()
    try:
        module = importlib.import_module("transformers.conversion_mapping")
    except ImportError:  # before version 5
        return ()
    return module.get_model_conversion_mapping(model)


def _renamed(name: str, transforms: Sequence[Any], known: Mapping[str, Shape]) -> str:
    """The present name of a tensor; the old one if that is not in the model."""
    new = name
    for transform in _only(transforms, converting=False):
        new, _ = transform.rename_source_key(new)
    if new in known:
        return new
    for transform in _only(transforms, converting=True):
        made, pattern = transform.rename_source_key(new)
        if pattern is not None and made in known:
            raise AdapterFileError(
                f"the adapter adapts {new.removesuffix('.weight')}, and this model holds it in "
                f"another parameter ({made}); bridge-peft merge can merge the adapter into a model "
                "directory that holds it apart"
            )
    return name


def _only(transforms: Sequence[Any], *, converting: bool) -> Iterator[Any]:
    return (t for t in transforms if hasattr(t, "operations") == converting)


def _has_layer(parts: Sequence[str]) -> bool:
    return any(part.isdecimal() for part in parts[1:])


def _exchange(name: str, old: str, new: str) -> str:
    """`name` with its beginning `old` exchanged for `new`; unchanged if it begins otherwise."""
    if old and not name.startswith(f"{old}."):
        return name
    end = name[len(old) + 1 :] if old else name
    return f"{new}.{end}" if new else end


def _fits(wanted: Shape, known: Shape) -> bool:
    return wanted is None or known is None or known in (wanted, wanted[::-1])
