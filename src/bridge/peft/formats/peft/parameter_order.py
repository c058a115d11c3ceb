"""Which of a module's parameters an adapter file's nested wrappers mean, asked of the model."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from bridge.peft.branch.kinds.experts import parameter_features
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.model.walk import base_modules


def in_order(adapter: AdapterFile, model: nn.Module) -> AdapterFile:
    """The adapter with its parameters as the model's modules have them.

    Their order: where our own file did not say it, it was taken to be that of transformers'
    experts. One expert in a stack: the file cannot tell it from a matrix. Which side is the input:
    older versions of PEFT took the other one for experts that lie (out, in).

    Args:
        adapter: Under the model's names.
        model: The model, not wrapped.
    """
    if not adapter.parameters:
        return adapter
    modules = base_modules(model)
    tensors = dict(adapter.tensors)
    by_module: dict[str, list[str]] = {}
    for fqn in adapter.tensors:
        if fqn in adapter.parameters and fqn not in adapter.alphas:
            by_module.setdefault(fqn.rpartition(".")[0], []).append(fqn)
    for owner, found in by_module.items():
        if owner not in modules:
            continue
        known = {f"{owner}.{n}": p for n, p in modules[owner]._parameters.items() if p is not None}
        if owner not in adapter.extra.get("parameters", {}) and known.keys() >= {*found}:
            ordered = [fqn for fqn in known if fqn in found]
            tensors |= dict(zip(ordered, (adapter.tensors[fqn] for fqn in found), strict=True))
        for fqn in known.keys() & {*found}:
            tensors[fqn] = _fitted(modules[owner], fqn.rpartition(".")[2], *tensors[fqn])
    return dataclasses.replace(adapter, tensors=tensors)


def _fitted(module: nn.Module, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    parameter = module._parameters[name]
    if parameter is None or parameter.dim() != 3:
        return a, b
    if a.dim() == 2:
        a, b = a[None], b[None]
    n_in, n_out = parameter_features(module, name)
    if (a.shape[-1], b.shape[-2]) == (n_out, n_in) and n_in != n_out:
        return b.mT.contiguous(), a.mT.contiguous()
    return a, b
