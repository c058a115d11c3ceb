"""Adapters in the files of Hugging Face PEFT: save from a model, load into one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bridge.peft.branch.functions.starts import split
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.token_rows import WithTokenRows
from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.peft.adapter_file import AdapterFile, read_adapter, write_adapter
from bridge.peft.formats.peft.attention import in_model
from bridge.peft.formats.peft.describe import adapter_of
from bridge.peft.formats.peft.experts import fused, separated
from bridge.peft.formats.peft.fingerprint import differences
from bridge.peft.formats.peft.fit import plan_load, plan_tokens
from bridge.peft.formats.peft.parameter_order import in_order
from bridge.peft.formats.peft.places import placed
from bridge.peft.formats.peft.saved_whole import parameters_saved_whole, replacements
from bridge.peft.lora import Model
from bridge.peft.model.adapt import Planned, adapt_in_place, check_can_be_adapted
from bridge.peft.model.trained_parameters import check_can_be_replaced, replace_parameters
from bridge.peft.model.walk import adapted_modules, token_rows_of, unwrap
from bridge.peft.parallel.fsdp import reshard
from bridge.peft.tensors import is_sharded, sharded_like


def save_adapter(
    model: nn.Module, directory: str | Path, *, experts: Literal["fused", "separate"] = "fused"
) -> Path:
    """Write the adapter of a model as PEFT writes it, all files or none.

    `adapter_config.json` and `adapter_model.safetensors` are PEFT's; `bridge_adapter.json` beside
    them holds what PEFT has no field for and is ignored by it. Base parameters that are trainable
    too, came with a loaded adapter, or are in no checkpoint of the base (a new head, the embedding
    of a new vocabulary) are saved whole (`modules_to_save`, `bias`). Sharded ones are gathered, so
    with those every rank must call; the first one writes.

    Args:
        model: An adapted model, possibly inside `DistributedDataParallel` or compiled.
        directory: Created if missing; an adapter in it is replaced.
        experts: How adapters of experts in one parameter are written: `"fused"` as PEFT's
            `target_parameters`, `"separate"` as linears of each expert, under the names that the
            model's checkpoint has for them.

    Returns:
        The directory.

    Raises:
        AdapterError: The model has no adapters, or the directory cannot be written to.
    """
    if experts not in ("fused", "separate"):
        raise AdapterError(f"experts must be 'fused' or 'separate', got {experts!r}")
    reshard(unwrap(model))
    adapter = adapter_of(model)
    if experts == "separate":
        adapter = separated(adapter, unwrap(model))
    whole = [p for _, p in parameters_saved_whole(unwrap(model)).values()]
    whole += [module.rows.weight for _, module in token_rows_of(model)]
    layers = [m for _, m in adapted_modules(model) if isinstance(m, LoRAMixin)]
    if not any(layer.is_sharded for layer in layers) and not any(map(is_sharded, whole)):
        return write_adapter(adapter, directory)
    failure: list[AdapterError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            write_adapter(adapter, directory)
        except AdapterError as error:
            failure = [error]
    # all ranks learn what became of it, or the others would wait for ever
    torch.distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]
    return Path(directory)


def load_adapter(
    model: Model,
    directory: str | Path,
    *,
    strict: bool = False,
    lora_dtype: torch.dtype | None = None,
) -> Model:
    """Adapt a base model as the files in `directory` say, in place.

    Everything is read and checked against the model first; on an error the model is untouched. A
    model that already carries an adapter of the same modules, ranks and scales takes the values.

    Args:
        model: The base model, its weights loaded.
        directory: A PEFT adapter directory.
        strict: Refuse an adapter that was trained on another base instead of warning.
        lora_dtype: Dtype of A and B; the default is float32, whatever the file's and the base's, or
            float64 where the file's are.

    Returns:
        The same model.

    Raises:
        AdapterFileError: The files are damaged or do not fit the model.
        AlreadyAdaptedError: The model carries another adapter.
    """
    root = unwrap(model)
    reshard(root)
    if next(adapted_modules(root), None) is None:
        check_can_be_adapted(model)
    with _told_together(root):
        adapter = in_model(read_adapter(directory))
    with _told_together(root):
        adapter = in_order(placed(fused(adapter, root), root), root)
        planned, present = plan_load(adapter, root, lora_dtype)
        tokens = plan_tokens(adapter, root, lora_dtype)
    modules = {
        adapter.name_in_file(fqn): _with_weight(module, parameter) if parameter else module
        for fqn, module, _, parameter in planned
    }
    _check_base(adapter, modules, strict)
    whole = replacements(adapter, root)
    check_can_be_replaced(root, whole)
    values = {fqn: _values(adapter, fqn) for fqn in adapter.tensors}
    if present:
        _set_values([(module, values[fqn]) for fqn, module, *_ in planned])
        for plan in tokens:
            assert isinstance(plan.module, WithTokenRows) and plan.values is not None
            plan.module.rows.set_to(plan.values)
    else:
        branches = [Planned(*item[:3], values[item[0]], item[3]) for item in planned]
        adapt_in_place(root, branches, tokens=tokens)
    replace_parameters(root, whole, adapter.frozen)
    return model


@contextmanager
def _told_together(model: nn.Module) -> Iterator[None]:
    """Raise an error of any rank inside on all of them, if the model is sharded.

    What follows is collective then: the others would wait for a rank that has left.
    """
    error: AdapterError | None = None
    try:
        yield
    except AdapterError as raised:
        error = raised
    if any(map(is_sharded, model.parameters())):
        said: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(said, None if error is None else str(error))
        failed = [rank for rank, words in enumerate(said) if words is not None]
        if failed and error is None:
            raise AdapterFileError(f"rank {failed[0]}: {said[failed[0]]}")
    if error is not None:
        raise error


def _values(adapter: AdapterFile, fqn: str) -> tuple[Tensor, ...]:
    """A and B of a module, and DoRA's magnitude, if it has one."""
    pair, magnitude = adapter.tensors[fqn], adapter.magnitudes.get(fqn)
    return pair if magnitude is None else (*pair, magnitude)


def _with_weight(module: nn.Module, parameter: str) -> nn.Module:
    """A module whose weight is the parameter, for comparing it with the one trained on."""
    stand_in = nn.Module()
    stand_in.register_parameter("weight", module._parameters[parameter])
    return stand_in


@torch.no_grad()
def _set_values(values: list[tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
    for module, (a, b, *magnitude) in values:
        assert isinstance(module, LoRAMixin)
        start, held = module.start, []
        if start is not None:
            (a, b), (start_a, start_b) = split(a, b)
            held = [(start.a, start_a), (start.b, start_b)]
        module.lora_a.set_whole(a)
        module.lora_b.set_whole(b)
        for parameter, whole in held:
            parameter.copy_(sharded_like(whole.to(parameter.dtype), parameter))
        if module.magnitude is not None:
            module.magnitude.set_to(*magnitude)


def _check_base(adapter: AdapterFile, modules: dict[str, nn.Module], strict: bool) -> None:
    """Warn, or refuse, if the base is not the one that the adapter was made on."""
    found = differences(adapter.extra.get("base", {}), modules)
    if not found:
        return
    message = (
        f"the base model is not the one that the adapter was made on: {found[0]}"
        f"{f' ({len(found)} modules differ)' if len(found) > 1 else ''}"
    )
    if strict:
        raise AdapterFileError(f"{message}; load the original base, or pass strict=False")
    warnings.warn(f"{message}; results may differ from training", stacklevel=3)
