"""A check-up of a model, an adapter, or the two together: pass, warn or fail, with the fix."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.doctor.model_checks import model_checks
from bridge.peft.doctor.report import Check, DoctorReport, some
from bridge.peft.doctor.tensor_checks import tensor_checks
from bridge.peft.errors import AdapterError
from bridge.peft.formats.peft import AdapterFile, load_adapter, read_adapter
from bridge.peft.formats.peft.fingerprint import differences
from bridge.peft.formats.peft.fit import plan_load, plan_tokens
from bridge.peft.formats.peft.places import placed
from bridge.peft.lora import LoRA
from bridge.peft.model.participation import check_still_adapted
from bridge.peft.model.walk import adapted_modules, base_modules, unwrap


def doctor(
    model: nn.Module | None = None,
    adapter: str | Path | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
) -> DoctorReport:
    """Check a model, an adapter directory, or whether the two fit; changes nothing.

    Args:
        model: A model, possibly wrapped. Of one that is not adapted yet a deep copy is adapted
            (with `adapter`, or with a fresh `LoRA()`), which takes its memory once more.
        adapter: A PEFT adapter directory.
        inputs: What the model is run on, by the names of its forward's arguments; None makes
            random ones for a model of transformers (text, vision, audio, encoder-decoder).

    Returns:
        A report; `print(report)` is a table, `report.healthy` is False if a check failed.

    Raises:
        AdapterError: Neither was given.

    Example:
        >>> report = doctor(model)
        >>> print(report)
    """
    if model is None and adapter is None:
        raise AdapterError("doctor needs a model, an adapter directory, or both")
    checks: list[Check] = []
    root = None if model is None else unwrap(model)
    if adapter is not None:
        checks += _file_checks(adapter, root)
    if root is not None and all(check.status != "fail" for check in checks):
        checks += _model_checks(root, adapter, inputs)
    return DoctorReport(tuple(checks))


def _file_checks(directory: str | Path, model: nn.Module | None) -> list[Check]:
    try:
        file = read_adapter(directory)
    except AdapterError as error:
        return [Check("file", "fail", str(error), "save or download the adapter again")]
    checks = [Check("file", "pass", f"{len(file.tensors)} modules, safetensors and config agree")]
    checks += tensor_checks(file.tensors)
    if model is not None:
        with contextlib.suppress(AdapterError):  # which `_fits` then says
            file = placed(file, model)
        checks += [_fits(file, model), _same_base(file, model)]
    return checks


def _fits(file: AdapterFile, model: nn.Module) -> Check:
    name = "keys and shapes"
    try:
        planned, _ = plan_load(file, model)
        plan_tokens(file, model)
    except AdapterError as error:
        return Check(name, "fail", str(error), "load it on the model that it was trained on")
    return Check(name, "pass", f"all {len(planned)} modules of the file fit the model")


def _same_base(file: AdapterFile, model: nn.Module) -> Check:
    name = "fingerprint of the base"
    stored = file.extra.get("base")
    if not stored:
        return Check(name, "skip", "the file does not say which base it was trained on")
    modules = {file.name_in_file(fqn): module for fqn, module in base_modules(model).items()}
    if found := differences(stored, modules):
        detail = f"{found[0]} ({len(found)} of {len(stored)} differ)"
        return Check(name, "warn", detail, "load the base model that the adapter was trained on")
    return Check(name, "pass", "the base is the one that the adapter was trained on")


def _model_checks(
    model: nn.Module, adapter: str | Path | None, inputs: Mapping[str, Any] | None
) -> list[Check]:
    checks: list[Check] = []
    if next(adapted_modules(model), None) is None:
        model = copy.deepcopy(model)
        if adapter is None:
            detail = "the model carries none; what follows is of a fresh LoRA() on a copy"
            checks.append(Check("adapters", "warn", detail, "LoRA(...)(model) adapts it"))
            LoRA()(model)
        else:
            load_adapter(model, adapter)
    try:
        check_still_adapted(model)
    except AdapterError as error:
        fix = "convert the model first, then adapt it"
        return [*checks, Check("state", "fail", str(error).partition(";")[0], fix)]
    modules = dict(adapted_modules(model))
    layers = {fqn: m for fqn, m in modules.items() if isinstance(m, LoRAMixin)}
    if wrapped := modules.keys() - layers.keys():
        detail = f"{len(wrapped)} modules wrap their base (LoRALinear); only their names are known"
        checks.append(Check("wrapped modules", "skip", detail))
    if not layers:
        return checks
    if empty := [fqn for fqn, layer in layers.items() if _is_meta(layer)]:
        detail = f"on the meta device, without values: {some(empty, len(layers))}"
        return [*checks, Check("state", "fail", detail, "load the weights first")]
    if adapter is None:
        factors = {fqn: layer.factors() for fqn, layer in layers.items()}
        pairs = {fqn: (a.detach(), b.detach()) for fqn, (a, b) in factors.items()}
        checks += tensor_checks(pairs)
        if any(check.status == "fail" for check in checks):
            # NaN in A or B would fail the checks that compute, each with a fix of its own
            return [*checks, Check("forward and backward", "skip", "the values are not finite")]
    return checks + model_checks(model, layers, inputs)


def _is_meta(layer: LoRAMixin) -> bool:
    return any(p.is_meta for p in (layer.base_weight, *layer.adapter_parameters().values()))
