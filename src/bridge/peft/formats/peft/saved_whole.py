"""What an adapter file holds beside A and B: modules saved whole, and biases."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.model.trained_parameters import trained_whole
from bridge.peft.model.walk import clean_fqn


def whole_of(
    model: nn.Module, adapted: Collection[str], others: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The base parameters that are trained beside the adapter, and the config fields for them.

    Args:
        model: An adapted model, not wrapped.
        adapted: Names of the adapted modules.
        others: Names of the model's other modules.

    Returns:
        The parameters by name, and `bias` and `modules_to_save` where they are not at default.

    Raises:
        AdapterError: A parameter is trained that a PEFT file has no place for.
    """
    trained = trained_whole(model)
    whole: dict[str, Tensor] = {}
    modules: dict[str, nn.Module] = {}
    bias = "none"
    for name, (module, parameter) in trained.items():
        fqn, _, last = name.rpartition(".")
        frozen = [p for p in module._parameters.values() if p is not None and not p.requires_grad]
        if last == "bias" and fqn in adapted:
            bias = "all" if bias == "all" else "lora_only"
        elif last == "bias" and frozen:
            bias = "all"
        else:
            modules[fqn] = module
        whole[name] = parameter.detach()
    fields: dict[str, Any] = {} if bias == "none" else {"bias": bias}
    if modules:
        for fqn, module in modules.items():
            _check_can_be_saved(fqn, module, adapted)
            whole.update({f"{fqn}.{n}": p.detach() for n, p in module.named_parameters()})
        fields["modules_to_save"] = _choose_names(modules, [*adapted, *others])
    return whole, fields


def check_whole(adapter: AdapterFile, model: nn.Module, names: Mapping[str, nn.Module]) -> None:
    """Raise unless the tensors saved whole have parameters of their shape in the model.

    Args:
        adapter: The file.
        model: The model, not wrapped.
        names: The base model's modules by name.

    Raises:
        AdapterFileError: A parameter is missing on either side or has another shape.
    """
    parameters = {clean_fqn(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    for name, tensor in adapter.whole.items():
        if name not in parameters:
            raise AdapterFileError(
                f"the file holds {name}, which is not a parameter of {type(model).__name__}; "
                "load it into the model that it was trained on"
            )
        have, wanted = tuple(parameters[name].shape), tuple(tensor.shape)
        if have != wanted:
            raise AdapterFileError(
                f"{name} is {have} in the model and {wanted} in the file; load it into the model "
                "that it was trained on (for a larger vocabulary: model.resize_token_embeddings)"
            )
        if parameters[name].is_meta:
            raise AdapterError(f"{name} is on the meta device; load the base weights first")
        if name in adapter.base_weights and not _same_values(parameters[name], tensor):
            raise AdapterFileError(
                f"the file adapts {name} and holds other values of it than the model; load it into "
                "the base that it was trained on, or copy the file's values into the model first"
            )
    saved = adapter.parsed.modules_to_save
    for fqn, module in names.items():
        if fqn and fqn.endswith(saved):
            own = [f"{fqn}.{name}" for name, _ in module.named_parameters()]
            if missing := [name for name in own if name not in adapter.whole]:
                raise AdapterFileError(
                    f"modules_to_save means {fqn}, and the file has no {missing[0]}; save the "
                    "adapter again"
                )


def _same_values(parameter: Tensor, saved: Tensor) -> bool:
    """Whether two tensors are the same, one of them perhaps rounded to the other's dtype."""
    own = parameter.detach().to(saved.device)
    return torch.equal(own.to(saved.dtype), saved) or torch.equal(own, saved.to(own.dtype))


def _check_can_be_saved(fqn: str, module: nn.Module, adapted: Collection[str]) -> None:
    fix = "freeze it (requires_grad_(False)) or train it in a module of its own"
    if not fqn:
        raise AdapterError(f"a parameter of the model itself is trained beside the adapter; {fix}")
    if fqn in adapted or any(name.startswith(f"{fqn}.") for name in adapted):
        raise AdapterError(
            f"{fqn} is adapted, or holds an adapted linear, and has a trainable parameter of its "
            f"own, which a PEFT file has no place for; {fix}"
        )
    if next(module.buffers(), None) is not None and any(
        name not in dict(module.named_parameters()) for name in module.state_dict()
    ):
        raise AdapterError(
            f"{fqn} is trained beside the adapter and has buffers, which are not saved; {fix}"
        )


def _choose_names(modules: Collection[str], everything: Collection[str]) -> list[str]:
    """Ends of names that mean exactly these modules, dots or not, as PEFT compares them."""
    wanted = set(modules)
    for entries in ({fqn.rpartition(".")[2] for fqn in wanted}, wanted):
        ends = tuple(entries)
        if not any(fqn.endswith(ends) and fqn not in wanted for fqn in everything):
            return sorted(entries)
    raise AdapterError(
        f"{sorted(wanted)[0]} is trained beside the adapter, and its name is the end of another's; "
        "PEFT could not tell them apart: rename it or freeze it"
    )
