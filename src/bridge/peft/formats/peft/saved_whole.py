"""What an adapter file holds beside A and B: modules saved whole, and biases."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.keys import is_embedding, is_head
from bridge.peft.model.trained_parameters import (
    check_can_be_trained,
    lost_with_the_base,
    trained_whole,
)
from bridge.peft.model.walk import adapter_parameters, clean_fqn, some_names
from bridge.peft.tensors import full_tensor


def parameters_saved_whole(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """The base parameters that belong into an adapter's file, by name, with their modules.

    Args:
        model: An adapted model, not wrapped.

    Returns:
        What is trained or came with an adapter, and what the base's checkpoint cannot give again.
    """
    found = trained_whole(model)
    own = {id(parameter) for _, parameter in adapter_parameters(model)}
    for fqn, module in lost_with_the_base(model).items():
        for name, owner in module.named_modules(prefix=fqn):
            for last, parameter in owner._parameters.items():
                if parameter is not None and id(parameter) not in own:
                    found.setdefault(f"{clean_fqn(name)}.{last}", (owner, parameter))
    return found


def whole_of(
    model: nn.Module, adapted: Collection[str], others: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file holds beside A and B, and the config fields for it.

    Args:
        model: An adapted model, not wrapped.
        adapted: Names of the adapted modules.
        others: Names of the model's other modules.

    Returns:
        The parameters by name, and `bias` and `modules_to_save` where they are not at default.

    Raises:
        AdapterError: A parameter is trained that a PEFT file has no place for.
    """
    whole: dict[str, Tensor] = {}
    modules: dict[str, nn.Module] = {}
    bias = "none"
    found = parameters_saved_whole(model)
    for name, (module, parameter) in found.items():
        fqn, _, last = name.rpartition(".")
        frozen = [p for p in module._parameters.values() if p is not None and not p.requires_grad]
        whole[name] = full_tensor(parameter)
        if not parameter.requires_grad and (fqn in adapted or is_head(name) or is_embedding(name)):
            continue  # PEFT asks for no field
        if last == "bias" and fqn in adapted:
            bias = "all" if bias == "all" else "lora_only"
        elif last == "bias" and frozen and parameter.requires_grad:
            bias = "all"
        else:
            modules[fqn] = module
    _warn_of_frozen(found, trained_whole(model))
    fields: dict[str, Any] = {} if bias == "none" else {"bias": bias}
    # what is inside another one is saved with it; PEFT cannot replace both
    modules = {f: m for f, m in modules.items() if not any(f.startswith(f"{o}.") for o in modules)}
    if modules:
        for fqn, module in modules.items():
            _check_can_be_saved(fqn, module, adapted)
            whole |= {f"{fqn}.{n}": full_tensor(p) for n, p in module.named_parameters()}
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
    lost = tuple(f"{fqn}." for fqn in lost_with_the_base(model)) if adapter.base_weights else ()
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
        is_base = name in adapter.base_weights and not name.startswith(lost)
        if is_base and not _is_of_same_base(parameters[name], tensor):
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


def replacements(adapter: AdapterFile, model: nn.Module) -> dict[str, Tensor]:
    """The tensors saved whole that are not the model's own already; warns of unexpected ones.

    Args:
        adapter: The file, checked against the model.
        model: The model, not wrapped.
    """
    parameters = {clean_fqn(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    frozen = {
        name for name in adapter.frozen if not _are_same(parameters[name], adapter.whole[name])
    }
    kept = adapter.frozen - frozen
    strange = [
        name
        for name in sorted(frozen - adapter.base_weights)
        if not (is_head(name) or is_embedding(name) or name.rpartition(".")[0] in adapter.tensors)
    ]
    if strange:
        warnings.warn(
            f"the file holds other values than the model of {some_names(strange)}, which its "
            "config does not name; they are loaded, as PEFT does",
            stacklevel=3,
        )
    return {name: tensor for name, tensor in adapter.whole.items() if name not in kept}


def _is_of_same_base(parameter: Tensor, saved: Tensor) -> bool:
    """Whether two tensors are the same but for the rows of new tokens."""
    half = -(-len(saved) // 2)
    return _are_same(parameter[:half], saved[:half])


def _are_same(parameter: Tensor, saved: Tensor) -> bool:
    """Whether two tensors are the same, one perhaps rounded to the other's dtype."""
    own = full_tensor(parameter).to(saved.device)
    return torch.equal(own.to(saved.dtype), saved) or torch.equal(own, saved.to(own.dtype))


def _warn_of_frozen(found: Collection[str], trained: Collection[str]) -> None:
    if frozen := [name for name in found if name not in trained]:
        warnings.warn(
            f"saved in full though not trained, because the base's checkpoint does not hold them: "
            f"{some_names(frozen)}",
            stacklevel=5,
        )


def _check_can_be_saved(fqn: str, module: nn.Module, adapted: Collection[str]) -> None:
    fix = "freeze it (requires_grad_(False)) or train it in a module of its own"
    if not fqn:
        raise AdapterError(f"a parameter of the model itself is trained beside the adapter; {fix}")
    if fqn in adapted or any(name.startswith(f"{fqn}.") for name in adapted):
        raise AdapterError(
            f"{fqn} is adapted, or holds an adapted linear, and has a trainable parameter of its "
            f"own, which a PEFT file has no place for; {fix}"
        )
    check_can_be_trained(fqn, module)


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
