"""Adapters of experts one by one, and of the same experts in one parameter.

A model of transformers holds the experts of a layer in one parameter that its checkpoint holds
apart. Which row of which expert's matrix is which row of the parameter is found by handing
transformers' own conversion the numbers of the rows in place of weights, so that every
architecture, with its names, order and interleaving, is read off it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bridge.peft.branch.kinds.experts import (
    is_turned,
    parameter_features,
    parameter_refusal,
)
from bridge.peft.branch.kinds.parameter_holder import ParameterHolder
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.registry import kind_of
from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.config import alpha_for, new_config
from bridge.peft.formats.peft.names import choose_targets
from bridge.peft.model.walk import base_modules, clean_fqn

#: The last names that PEFT rewrites, by transformers' pattern of conversion.
_PEFT_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


class Part(NamedTuple):
    """What one expert's linear is in the parameter that holds all of them.

    Attributes:
        parameter: The parameter's fully qualified name.
        expert: Its number in the stack.
        rows: Which outputs of the parameter's matrix are those of the linear.
    """

    parameter: str
    expert: int
    rows: Tensor


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The linears that the checkpoint holds and the model does not, with their places.

    Args:
        model: The model, not wrapped.

    Returns:
        By fully qualified name in the checkpoint; empty where nothing is held apart.
    """
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
        return {}
    try:
        revert = importlib.import_module("transformers.core_model_loading").revert_weight_conversion
    except (ImportError, AttributeError):  # before version 5
        return {}
    numbered: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    for fqn, module in base_modules(model).items():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dim() != 3 or isinstance(module, _ConvNd):
                continue
            key = f"{fqn}.{name}".lstrip(".")
            experts, out = parameter.shape[0], parameter_features(module, name)[1]
            rows = torch.arange(experts * out, device="cpu").view(experts, out)
            numbered[key] = rows[:, None] if is_turned(module, parameter) else rows[..., None]
            widths[key] = out
    parts: dict[str, Part] = {}
    for key, tensor in numbered.items():
        try:
            found = revert(model, {key: tensor})
        except Exception:  # a conversion of another kind, which wants other tensors beside it
            continue
        for name, rows in found.items():
            if rows.dim() == 2 and name.endswith(".weight"):
                places = rows.flatten()
                part = Part(key, int(places[0]) // widths[key], places % widths[key])
                parts[clean_fqn(name.removesuffix(".weight"))] = part
    return parts


def misread_by_peft(model: nn.Module, fqns: Iterable[str]) -> list[str]:
    """The linears that PEFT takes for the experts' by their last names, and so leaves out.

    It rewrites `target_modules` of some architectures from before their experts were one
    parameter (`_convert_peft_config_moe` of PEFT 0.21): shared experts and dense layers are lost.

    Args:
        model: The model, not wrapped.
        fqns: Adapted linears.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ImportError:
        return []
    kinds = {**getattr(mapping, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}
    ends = _PEFT_EXPERTS.get(kinds.get(model_type, ""), ())
    return [fqn for fqn in fqns if fqn.rpartition(".")[2] in ends]


def fused(adapter: AdapterFile, model: nn.Module) -> AdapterFile:
    """The adapter with the branches of experts one by one as branches of their parameters.

    Linears that share one parameter (gate and up) keep their own A: the ranks are stacked and B
    is block by block, which is the same function. An expert that the file does not adapt gets
    zeros.

    Args:
        adapter: As it was read.
        model: The model that it is for, not wrapped.

    Raises:
        AdapterFileError: The file adapts both a parameter and linears in it.
    """
    names = base_modules(model)
    adapter = _with_routers(adapter, names)
    if all(fqn in names for fqn in adapter.tensors.keys() - adapter.parameters):
        return adapter
    parts = parts_of(model)
    groups: dict[str, dict[str, Part]] = {}
    for fqn in adapter.tensors:
        if fqn not in names and fqn in parts:
            groups.setdefault(parts[fqn].parameter, {})[fqn] = parts[fqn]
    if not groups:
        return adapter
    tensors = {
        fqn: pair
        for fqn, pair in adapter.tensors.items()
        if not any(fqn in group for group in groups.values())
    }
    alphas, in_file = dict(adapter.alphas), dict(adapter.names_in_file)
    for parameter, group in groups.items():
        if parameter in tensors:
            raise AdapterFileError(
                f"the file adapts {parameter} and {next(iter(group))}, which is a part of it; save "
                "the adapter again"
            )
        holder, _, name = parameter.rpartition(".")
        shape = names[holder]._parameters[name].shape  # pyright: ignore[reportOptionalMemberAccess]
        n_in, n_out = parameter_features(names[holder], name)
        scale = adapter.scale(next(iter(group)))
        pair = _stack(adapter, group, scale, (shape[0], n_out, n_in))
        tensors[parameter] = pair
        alphas[parameter] = alpha_for(scale, pair[0].shape[1], adapter.parsed.use_rslora)
        in_file[parameter] = next(iter(group))
    return dataclasses.replace(
        adapter,
        tensors=tensors,
        parameters=adapter.parameters | groups.keys(),
        alphas=alphas,
        names_in_file=in_file,
    )


def _with_routers(adapter: AdapterFile, names: Mapping[str, nn.Module]) -> AdapterFile:
    """The adapter with what was a linear and is a module of its own now under its parameter."""
    moved = {
        fqn: f"{fqn}.weight"
        for fqn in adapter.tensors.keys() & names.keys()
        if isinstance(names[fqn], ParameterHolder) or _is_router(names[fqn])
    }
    if not moved:
        return adapter
    return dataclasses.replace(
        adapter,
        tensors={moved.get(fqn, fqn): pair for fqn, pair in adapter.tensors.items()},
        parameters=adapter.parameters | {*moved.values()},
        alphas=adapter.alphas | {new: adapter.alpha(old) for old, new in moved.items()},
        names_in_file=adapter.names_in_file | {new: old for old, new in moved.items()},
    )


def matrices_as_linears(adapter: AdapterFile) -> AdapterFile:
    """The adapter with parameters of one matrix, a router's, as the linears that they are.

    Args:
        adapter: As it was read.
    """
    moved = {
        fqn: fqn.removesuffix(".weight")
        for fqn in adapter.parameters
        if fqn.endswith(".weight") and adapter.tensors[fqn][0].dim() == 2
    }
    names = ("exceptions", "base")
    fields = {name: adapter.extra[name] for name in names if name in adapter.extra}
    extra = {n: {moved.get(fqn, fqn): v for fqn, v in by.items()} for n, by in fields.items()}
    return dataclasses.replace(
        adapter,
        extra=adapter.extra | extra,
        tensors={moved.get(fqn, fqn): pair for fqn, pair in adapter.tensors.items()},
        parameters=adapter.parameters - moved.keys(),
        alphas=adapter.alphas | {new: adapter.alpha(old) for old, new in moved.items()},
    )


def _is_router(module: nn.Module) -> bool:
    """Whether a module is no linear and multiplies with a weight of its own."""
    is_linear = kind_of(type(module)) is not None or isinstance(module, LoRAMixin)
    weight = module._parameters.get("weight")
    is_matrix = weight is not None and weight.dim() == 2
    return is_matrix and not is_linear and parameter_refusal(module, "weight") is None


def _stack(
    adapter: AdapterFile, group: Mapping[str, Part], scale: float, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """A (experts, rank, in) and B (experts, out, rank) of a parameter, for one scale."""
    experts, n_out, n_in = shape
    columns: dict[tuple[int, ...], int] = {}  # the rank of each kind of linear: gate, up, …
    for fqn, part in group.items():
        a, b = adapter.tensors[fqn]
        if (a.shape[1], b.shape[0]) != (n_in, len(part.rows)):
            raise AdapterFileError(
                f"{fqn} is {len(part.rows)}×{n_in} (out×in) in the model and "
                f"{b.shape[0]}×{a.shape[1]} in the file; load the adapter into the model that it "
                "was trained on"
            )
        key = _kind(part)
        columns[key] = max(columns.get(key, 0), a.shape[0])
    first = adapter.tensors[next(iter(group))]
    is_one = _have_one_a(adapter, group)
    rank = max(columns.values()) if is_one else sum(columns.values())
    stack_a = first[0].new_zeros(experts, rank, n_in)
    stack_b = first[1].new_zeros(experts, n_out, rank)
    starts, start = {}, 0
    for key, width in columns.items():
        starts[key] = 0 if is_one else start
        start += width
    for fqn, part in group.items():
        a, b = adapter.tensors[fqn]
        held = slice(starts[_kind(part)], starts[_kind(part)] + a.shape[0])
        stack_a[part.expert, held] = a
        # exact where scales are alike, or differ by a power of two
        stack_b[part.expert, part.rows, held] = b * (adapter.scale(fqn) / scale)
    return stack_a, stack_b


def _kind(part: Part) -> tuple[int, ...]:
    return tuple(part.rows.tolist())


def _have_one_a(adapter: AdapterFile, group: Mapping[str, Part]) -> bool:
    """Whether all linears of an expert have the same A, as those have that were one parameter."""
    first: dict[int, Tensor] = {}
    for fqn, part in group.items():
        a = adapter.tensors[fqn][0]
        if not torch.equal(first.setdefault(part.expert, a), a):
            return False
    return True


def separated(adapter: AdapterFile, model: nn.Module) -> AdapterFile:
    """The adapter with every expert's linears by themselves, under the checkpoint's names.

    Each takes its expert's A and its own rows of B; the function is the same.

    Args:
        adapter: As `adapter_of` gives it.
        model: The model that it is of, not wrapped.

    Raises:
        AdapterError: The model's checkpoint does not hold a parameter's experts apart.
    """
    adapter = matrices_as_linears(adapter)
    if not adapter.parameters:
        return adapter
    parts = parts_of(model)
    places: dict[str, list[str]] = {}
    for name, part in parts.items():
        places.setdefault(part.parameter, []).append(name)
    if lacking := sorted(adapter.parameters - places.keys()):
        raise AdapterError(
            f"{lacking[0]} is one tensor in the model's checkpoint too, so there are no experts to "
            "save apart; leave experts='separate' out"
        )
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    source: dict[str, str] = {}
    for fqn, (a, b) in adapter.tensors.items():
        if fqn not in adapter.parameters:
            tensors[fqn], source[fqn] = (a, b), fqn
            continue
        for name in places[fqn]:
            part = parts[name]
            tensors[name] = a[part.expert].clone(), b[part.expert, part.rows].clone()
            source[name] = fqn
    others = [fqn for fqn in base_modules(model) if fqn and fqn not in tensors]
    kept = ("modules_to_save", "bias", "base_model_name_or_path", "task_type", "use_rslora")
    config = new_config(
        {name: adapter.rank(fqn) for name, fqn in source.items()},
        {name: adapter.alpha(fqn) for name, fqn in source.items()},
        choose_targets(tensors, others),
        **{name: adapter.config[name] for name in kept},
    )
    # dropout stays beside the config: PEFT makes one parameter of these again, and refuses it there
    extra = {k: v for k, v in adapter.extra.items() if k != "parameters"}
    return dataclasses.replace(
        adapter, config=config, tensors=tensors, extra=extra, parameters=set()
    )
