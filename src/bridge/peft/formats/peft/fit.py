"""Whether an adapter file fits a model, checked before the model is touched."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bridge.peft.branch.functions.starts import is_subtracted
from bridge.peft.branch.kinds import Conv1DAdapter, LinearAdapter
from bridge.peft.branch.kinds.experts import (
    ParameterBranch,
    parameter_features,
    parameter_refusal,
)
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.options import BranchOptions
from bridge.peft.branch.registry import check_adaptable, features, kind_of, unsupported_reason
from bridge.peft.branch.untouched import check_untouched
from bridge.peft.dtypes import sound_dtype
from bridge.peft.errors import (
    AdapterError,
    AdapterFileError,
    AlreadyAdaptedError,
    TargetError,
)
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.config import PeftConfig, alpha_for
from bridge.peft.formats.peft.describe import file_rank
from bridge.peft.formats.peft.extra import branch_settings
from bridge.peft.formats.peft.kernels import kernel_of
from bridge.peft.formats.peft.names import common_part, ends_in
from bridge.peft.formats.peft.saved_whole import check_whole
from bridge.peft.model.adapt import PlannedTokens
from bridge.peft.model.trained_parameters import trained_whole
from bridge.peft.model.walk import adapted_modules, base_modules, token_rows_of
from bridge.peft.model.weight_reads import read_weights
from bridge.peft.targets import candidates, output_heads
from bridge.peft.token_targets import check_rows, tied_to

#: A module to load into, with its name, the options of its branch, and the name of its parameter.
Planned = tuple[str, nn.Module, BranchOptions, str]


def plan_load(
    adapter: AdapterFile, model: nn.Module, lora_dtype: torch.dtype | None = None
) -> tuple[list[Planned], bool]:
    """Check a file against a model; touches nothing.

    Args:
        adapter: The file, under the model's names (`placed`).
        model: The model, not wrapped.
        lora_dtype: Dtype of A and B; None is float32, float64 where the file's are.

    Returns:
        The modules to load into, and whether they are adapted already.

    Raises:
        AdapterFileError: The file does not fit.
        AlreadyAdaptedError: The model carries another adapter.
    """
    present = dict(adapted_modules(model))
    names, read = base_modules(model), read_weights(model)
    if present:
        _check_same_adapter(adapter, present, model)
        if lora_dtype is not None:
            raise AlreadyAdaptedError(
                "lora_dtype is that of a new adapter, and the model carries one; leave it out"
            )
    else:
        _check_targets(adapter, names, model)
    check_whole(adapter, model, names)
    planned: list[Planned] = []
    for fqn, (a, b) in adapter.tensors.items():
        parameter = ""
        module = present.get(fqn) or names.get(fqn)
        if module is None:
            holder, _, parameter = fqn.rpartition(".")
            module = names[holder]
        if not present:
            _check_adaptable(fqn, module, parameter, is_read=module in read)
        _check_fits(fqn, module, parameter, a, b)
        if not parameter and fqn not in adapter.parameters:
            _check_kind(fqn, module, adapter)
        planned.append((fqn, module, _options(adapter, fqn, lora_dtype), parameter))
    return planned, bool(present)


def plan_tokens(
    adapter: AdapterFile, model: nn.Module, lora_dtype: torch.dtype | None = None
) -> list[PlannedTokens]:
    """Check the token rows of a file against a model; touches nothing.

    Args:
        adapter: The file, under the model's names (`placed`).
        model: The model, not wrapped; `plan_load` has passed it.
        lora_dtype: Dtype of the rows; None is float32, float64 where the file's are.

    Returns:
        What to give rows to, or whose rows to set where they are there.

    Raises:
        AdapterFileError: The file does not fit.
        AlreadyAdaptedError: The model has rows of other tokens.
    """
    given = {fqn: module.rows.tokens for fqn, module in token_rows_of(model)}
    names, everything = base_modules(model), candidates(model)
    branches = {names[fqn] for fqn in adapter.tensors if fqn in names}  # else of a parameter
    planned: list[PlannedTokens] = []
    for fqn, rows in adapter.tokens.items():
        order = sorted(range(len(rows)), key=adapter.token_indices(fqn).__getitem__)
        tokens = tuple(adapter.token_indices(fqn)[i] for i in order)
        if fqn not in names:
            raise AdapterFileError(
                f"the file has token rows for {fqn}, which {type(model).__name__} does not have; "
                "load it into the model that it was trained on"
            )
        module, followers = names[fqn], tied_to(names[fqn], everything)
        if not given:
            _check_rows(fqn, module, tokens, rows)
        if not branches.isdisjoint(followers):
            raise AdapterFileError(
                f"the file has token rows for {fqn} and adapts what is tied to it in the model; "
                "load it into a model where they are not tied"
            )
        dtype = lora_dtype or sound_dtype(rows.dtype)
        planned.append(PlannedTokens(fqn, module, tokens, followers, rows[order], dtype))
    wanted = {plan.fqn: plan.tokens for plan in planned}
    if next(adapted_modules(model), None) is not None and given != wanted:
        raise AlreadyAdaptedError(
            "the model and the file have trained rows of different tokens; load into the base "
            "model, or into one adapted alike"
        )
    return planned


def _check_rows(fqn: str, module: nn.Module, tokens: tuple[int, ...], rows: Tensor) -> None:
    try:
        check_rows(fqn, module, tokens)
    except TargetError as error:
        raise AdapterFileError(f"the file does not fit the model: {error}") from error
    weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    if weight.shape[1] != rows.shape[1]:
        raise AdapterFileError(
            f"rows of {fqn} have {weight.shape[1]} values in the model and {rows.shape[1]} in the "
            "file; load the adapter into the model that it was trained on"
        )
    if weight.is_meta:
        raise AdapterError(f"{fqn} is on the meta device; load the base weights first")


def _check_same_adapter(
    adapter: AdapterFile, present: Mapping[str, nn.Module], model: nn.Module
) -> None:
    fix = "load into the base model, or into one adapted alike"
    if differing := sorted(present.keys() ^ adapter.tensors.keys()):
        raise AlreadyAdaptedError(
            f"the model carries an adapter of {len(present)} modules, the file one of "
            f"{len(adapter.tensors)} (first difference: {differing[0]}); {fix}"
        )
    if extra := sorted(trained_whole(model).keys() - adapter.whole.keys()):
        raise AlreadyAdaptedError(
            f"{extra[0]} is trained beside the model's adapter and not in the file; {fix}"
        )
    for fqn, module in present.items():
        if not isinstance(module, LoRAMixin):
            raise AlreadyAdaptedError(f"{fqn} wraps its base in {type(module).__name__}; {fix}")
        if module.merged:
            raise AlreadyAdaptedError(f"{fqn} is merged; unmerge(model) before loading")
        if (module.magnitude is not None) != adapter.parsed.use_dora:
            raise AlreadyAdaptedError(
                f"{fqn} and the file differ in DoRA (use_dora), which adds a magnitude; {fix}"
            )
        name = adapter.name_in_file(fqn)
        method = branch_settings(adapter.extra, name, 0.0)["lora_A_init_method"]
        if (module.start is not None) != is_subtracted(method):
            raise AlreadyAdaptedError(
                f"{fqn} and the file differ in their start ({method} in the file), half of which "
                f"is subtracted; {fix}"
            )
        have, wanted = (file_rank(module), module.scale), (adapter.rank(fqn), adapter.scale(fqn))
        if have != wanted:
            raise AlreadyAdaptedError(
                f"{fqn} has rank {have[0]} and scale {have[1]:g}, in the file rank {wanted[0]} and "
                f"scale {wanted[1]:g}; {fix}"
            )


def _check_targets(adapter: AdapterFile, names: Mapping[str, nn.Module], root: nn.Module) -> None:
    matched = _targets(adapter.parsed, names, root)
    held = {
        f"{fqn}.{name}".lstrip(".")
        for fqn, module in names.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    if unknown := [
        fqn for fqn in adapter.tensors if fqn not in (held if fqn in adapter.parameters else names)
    ]:
        raise AdapterFileError(
            f"the file adapts {unknown[0]}, which {type(root).__name__} does not have "
            f"({len(unknown)} of {len(adapter.tensors)} modules are missing); load it into the "
            "model that it was trained on"
        )
    entries = adapter.parsed.target_parameters
    matched |= {fqn for fqn in held if ends_in(fqn, entries)}
    # a module of a parameter that the file has under another name, an attention's or a router's
    moved = adapter.parameters & adapter.names_in_file.keys()
    matched -= {fqn.rpartition(".")[0] for fqn in moved}
    # a file of an inner model says nothing of the modules beside that one
    part = common_part(adapter.names_in_file.keys() - adapter.alphas.keys())
    without = sorted(fqn for fqn in matched - adapter.tensors.keys() if fqn.startswith(part))
    if without:
        raise AdapterFileError(
            f"{_field(without[0], names)} matches {without[0]}, for which the file has no tensors "
            f"({len(without)} such modules); save the adapter again"
        )
    unmatched = sorted(adapter.tensors.keys() - matched - adapter.names_in_file.keys())
    if unmatched:  # a name that is another in the file was checked there
        raise AdapterFileError(
            f"the file has tensors for {unmatched[0]}, which "
            f"{_field(unmatched[0], names)} does not match ({len(unmatched)} such modules); save "
            "the adapter again"
        )


def _field(fqn: str, names: Mapping[str, nn.Module]) -> str:
    return "target_modules" if fqn in names else "target_parameters"


def _targets(config: PeftConfig, names: Mapping[str, nn.Module], model: nn.Module) -> set[str]:
    """The names of the modules that PEFT would adapt."""
    if config.target_modules is not None:
        return {fqn for fqn in names if fqn and config.is_target(fqn)}
    heads = output_heads(model)
    return {
        fqn
        for fqn, module in names.items()
        if kind_of(type(module)) in (LinearAdapter, Conv1DAdapter)
        and id(module) not in heads
        and not config.is_excluded(fqn)
    }


def _options(adapter: AdapterFile, fqn: str, lora_dtype: torch.dtype | None) -> BranchOptions:
    a, b = adapter.tensors[fqn]
    name = adapter.name_in_file(fqn)
    settings = branch_settings(adapter.extra, name, adapter.parsed.lora_dropout)
    dim, alpha = adapter.rank(fqn), adapter.alpha(fqn)
    if is_subtracted(settings["lora_A_init_method"]):
        if dim % 2:
            raise AdapterFileError(
                f"{fqn}: bridge_adapter.json says {settings['lora_A_init_method']}, and half of a "
                f"rank of {dim} would be its start; save the adapter again"
            )
        dim //= 2
        alpha = alpha_for(adapter.scale(fqn), dim, adapter.parsed.use_rslora)
    return BranchOptions(
        dim=dim,
        alpha=alpha,
        lora_dtype=lora_dtype or sound_dtype(torch.promote_types(a.dtype, b.dtype)),
        use_rslora=adapter.parsed.use_rslora,
        use_dora=adapter.parsed.use_dora,
        **settings,
    )


def _check_adaptable(fqn: str, module: nn.Module, parameter: str, *, is_read: bool) -> None:
    if parameter:
        reason = parameter_refusal(module, parameter)
    else:
        reason = unsupported_reason(module, is_read=is_read)
    if reason:
        raise AdapterFileError(
            f"the file adapts {fqn}, a {type(module).__name__} that cannot be adapted: {reason}"
        )
    check_untouched(module) if parameter else check_adaptable(module, is_read=is_read)


def _check_kind(fqn: str, module: nn.Module, adapter: AdapterFile) -> None:
    """Raise unless a module is of the kind that the file's keys and kernels are of."""
    is_embedding, kernel = fqn in adapter.embeddings, adapter.kernels.get(fqn)
    if is_embedding == isinstance(module, nn.Embedding) and kernel == kernel_of(module):
        return
    kind = "an embedding" if is_embedding else "a linear"
    if kernel is not None:
        kind = f"a convolution of kernel {kernel.size} and {kernel.groups} groups"
    have = f", {found}" if (found := kernel_of(module)) else ""
    raise AdapterFileError(
        f"the file adapts {fqn} as {kind}, and in the model it is a {type(module).__name__}{have}; "
        "load it into the model that it was trained on"
    )


def _check_fits(fqn: str, module: nn.Module, parameter: str, a: Tensor, b: Tensor) -> None:
    n_in, n_out = parameter_features(module, parameter) if parameter else features(module)
    weight = getattr(module, parameter or "weight", None)
    if isinstance(module, ParameterBranch):
        weight = module.base_weight
    if (a.shape[-1], b.shape[-2]) != (n_in, n_out):
        raise AdapterFileError(
            f"{fqn} is {n_out}×{n_in} (out×in) in the model and {b.shape[-2]}×{a.shape[-1]} in the "
            "file; load the adapter into the model that it was trained on"
        )
    if (parameter or isinstance(module, ParameterBranch)) and isinstance(weight, Tensor):
        experts, wanted = tuple(a.shape[:-2]), tuple(weight.shape[:-2])
        if experts != wanted:
            raise AdapterFileError(
                f"{fqn} has {wanted[0] if wanted else 1} matrices in the model and "
                f"{experts[0] if experts else 1} in the file; load the adapter into the model that "
                "it was trained on"
            )
    if isinstance(weight, Tensor) and weight.is_meta:
        raise AdapterError(f"{fqn} is on the meta device; load the base weights first")
