"""Adapters in the files of Hugging Face PEFT: save from a model, load into one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft import __version__
from bridge.peft.adaptable import check_adaptable
from bridge.peft.branch import TRAINABLE_DTYPES, BranchOptions
from bridge.peft.errors import AdapterError, AdapterFileError, AlreadyAdaptedError
from bridge.peft.formats.adapter_file import AdapterFile, read_adapter, write_adapter
from bridge.peft.formats.peft_targets import choose_targets, most_common_and_exceptions, targets
from bridge.peft.lora import patch_in_place
from bridge.peft.lora_mixin import LoRAMixin
from bridge.peft.module_matcher import adapted_modules, clean_fqn, unwrap

__all__ = ["AdapterFile", "load_adapter", "read_adapter", "save_adapter", "write_adapter"]

#: The fields of PEFT's `LoraConfig` that every version since 0.14 knows, at their defaults. Newer
#: ones are left out at their defaults, so that older versions read the file without a warning.
_CONFIG: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "revision": None,
    "use_dora": False,
}


def save_adapter(model: nn.Module, directory: str | Path) -> Path:
    """Write the adapter of a model as PEFT writes it, all files or none.

    `adapter_config.json` and `adapter_model.safetensors` are PEFT's; `bridge_adapter.json` beside
    them holds what PEFT has no field for and is ignored by it. Sharded A and B are gathered, so
    with those every rank must call.

    Args:
        model: An adapted model, possibly inside `DistributedDataParallel` or compiled.
        directory: Created if missing; an adapter in it is replaced.

    Returns:
        The directory.

    Raises:
        AdapterError: The model has no adapters, or the directory cannot be written to.
    """
    return write_adapter(adapter_of(model), directory)


def load_adapter(model: nn.Module, directory: str | Path, *, strict: bool = False) -> nn.Module:
    """Adapt a base model as the files in `directory` say, in place.

    Everything is read and checked against the model first; on an error the model is untouched. A
    model that already carries an adapter of the same modules, ranks and scales takes the values.

    Args:
        model: The base model, its weights loaded.
        directory: A PEFT adapter directory.
        strict: Refuse an adapter that was trained on another base instead of warning.

    Returns:
        The same model.

    Raises:
        AdapterFileError: The files are damaged or do not fit the model.
        AlreadyAdaptedError: The model carries another adapter.
    """
    adapter = read_adapter(directory)
    root = unwrap(model)
    present = dict(adapted_modules(model))
    if present:
        _check_same_adapter(adapter, present)
        loaded = present
    else:
        loaded = {clean_fqn(fqn): module for fqn, module in root.named_modules()}
        _check_targets(adapter, loaded, root)
    planned = [(fqn, loaded[fqn], _options(adapter, fqn)) for fqn in adapter.tensors]
    for fqn, module, _ in planned:
        _check_fits(fqn, module, *adapter.tensors[fqn])
        if not present:
            check_adaptable(module)
    if not present:
        patch_in_place(root, [(module, options, 0) for _, module, options in planned])
    for fqn, module, _ in planned:
        assert isinstance(module, LoRAMixin)
        with torch.no_grad():
            for matrix, tensor in zip(
                (module.lora_a, module.lora_b), adapter.tensors[fqn], strict=True
            ):
                matrix.weight.copy_(tensor)
    return model


def adapter_of(model: nn.Module) -> AdapterFile:
    """The adapter of a model as a PEFT file would hold it; tensors share the model's storage.

    Args:
        model: An adapted model.

    Raises:
        AdapterError: The model has no adapters, or one that a PEFT file cannot hold.
    """
    layers = _layers(model)
    root = unwrap(model)
    below = tuple(f"{fqn}." for fqn in layers)
    names = (clean_fqn(fqn) for fqn, _ in root.named_modules())
    others = [fqn for fqn in names if fqn and fqn not in layers and not fqn.startswith(below)]
    use_rslora, alphas = _scaling(layers)
    rank, rank_pattern = most_common_and_exceptions({f: m.dim for f, m in layers.items()})
    alpha, alpha_pattern = most_common_and_exceptions(alphas)
    branch, exceptions = most_common_and_exceptions({f: _branch(m) for f, m in layers.items()})
    config = _CONFIG | {
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": branch[0],
        "use_rslora": use_rslora,
        "target_modules": choose_targets(layers, others),
        "base_model_name_or_path": getattr(getattr(root, "config", None), "_name_or_path", None)
        or None,
        "task_type": _task_type(root),
    }
    extra: dict[str, Any] = {
        "bridge_peft_version": __version__,
        "dropout_position": branch[1],
        "lora_A_init_method": branch[2],
    }
    if exceptions:
        extra["exceptions"] = {
            fqn: dict(zip(("dropout", "dropout_position", "lora_A_init_method"), b, strict=True))
            for fqn, m in layers.items()
            if (b := _branch(m)) != branch
        }
    tensors = {f: (_whole(m.lora_a.weight), _whole(m.lora_b.weight)) for f, m in layers.items()}
    return AdapterFile(config=config, tensors=tensors, extra=extra)


def _layers(model: nn.Module) -> dict[str, LoRAMixin]:
    layers: dict[str, LoRAMixin] = {}
    for fqn, module in adapted_modules(model):
        if not isinstance(module, LoRAMixin):
            raise AdapterError(
                f"{fqn} wraps its base in {type(module).__name__}; PEFT files hold only layers "
                "that were adapted in place"
            )
        if not fqn:
            raise AdapterError(
                "the model is itself the adapted linear, and PEFT files name modules; put it into "
                "an nn.Sequential"
            )
        if module.lora_a.weight.is_meta or module.lora_b.weight.is_meta:
            raise AdapterError(f"{fqn} is on the meta device and has no values to save; load them")
        layers[fqn] = module
    if not layers:
        raise AdapterError("the model has no adapters to save; LoRA(...)(model) adds them")
    return layers


def _scaling(layers: dict[str, LoRAMixin]) -> tuple[bool, dict[str, float]]:
    """Whether the scales are rank-stabilised, and the alphas that give exactly these scales."""
    plain = all(m.scale == m.alpha / m.dim for m in layers.values())
    use_rslora = not plain and all(m.scale == m.alpha / math.sqrt(m.dim) for m in layers.values())
    return use_rslora, {
        fqn: _as_int(m.alpha if use_rslora else _alpha_for(m)) for fqn, m in layers.items()
    }


def _alpha_for(module: LoRAMixin) -> float:
    """The alpha with `alpha / dim == scale`, exactly where a float can say so."""
    if module.scale == module.alpha / module.dim:
        return module.alpha
    alpha = module.scale * module.dim
    around = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in around if a / module.dim == module.scale), alpha)


def _as_int(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _branch(module: LoRAMixin) -> tuple[float, str, str]:
    return module.dropout.p, module.dropout_position, module.lora_a.init_method


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach()


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None


def _check_same_adapter(adapter: AdapterFile, present: dict[str, Any]) -> None:
    mend = "load into the base model, or into one adapted alike"
    if differing := sorted(present.keys() ^ adapter.tensors.keys()):
        raise AlreadyAdaptedError(
            f"the model carries an adapter of {len(present)} modules, the file one of "
            f"{len(adapter.tensors)} (first difference: {differing[0]}); {mend}"
        )
    for fqn, module in present.items():
        if not isinstance(module, LoRAMixin):
            raise AlreadyAdaptedError(f"{fqn} wraps its base in {type(module).__name__}; {mend}")
        if module.merged:
            raise AlreadyAdaptedError(f"{fqn} is merged; unmerge(model) before loading")
        have, wanted = (module.dim, module.scale), (adapter.rank(fqn), adapter.scale(fqn))
        if have != wanted:
            raise AlreadyAdaptedError(
                f"{fqn} has rank {have[0]} and scale {have[1]:g}, in the file rank {wanted[0]} and "
                f"scale {wanted[1]:g}; {mend}"
            )


def _check_targets(adapter: AdapterFile, names: dict[str, nn.Module], root: nn.Module) -> None:
    matched = set(targets(adapter.parsed, names, root))
    if unknown := [fqn for fqn in adapter.tensors if fqn not in names]:
        raise AdapterFileError(
            f"the file adapts {unknown[0]}, which {type(root).__name__} does not have "
            f"({len(unknown)} of {len(adapter.tensors)} modules are missing); load it into the "
            "model that it was trained on"
        )
    if without := sorted(matched - adapter.tensors.keys()):
        raise AdapterFileError(
            f"target_modules matches {without[0]}, for which the file has no tensors "
            f"({len(without)} such modules); mend target_modules or save the adapter again"
        )
    if unmatched := sorted(adapter.tensors.keys() - matched):
        raise AdapterFileError(
            f"the file has tensors for {unmatched[0]}, which target_modules does not match "
            f"({len(unmatched)} such modules); mend target_modules or save the adapter again"
        )


def _options(adapter: AdapterFile, fqn: str) -> BranchOptions:
    extra = adapter.extra | adapter.extra.get("exceptions", {}).get(fqn, {})
    a, b = adapter.tensors[fqn]
    return BranchOptions(
        dim=adapter.rank(fqn),
        alpha=adapter.alpha(fqn),
        dropout=extra.get("dropout", adapter.parsed.lora_dropout),
        dropout_position=extra.get("dropout_position", "pre"),
        lora_A_init_method=extra.get("lora_A_init_method", "uniform"),
        lora_dtype=torch.promote_types(a.dtype, b.dtype),
        use_rslora=adapter.parsed.use_rslora,
    )


def _check_fits(fqn: str, module: nn.Module, a: Tensor, b: Tensor) -> None:
    n_in, n_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if (a.shape[1], b.shape[0]) != (n_in, n_out):
        raise AdapterFileError(
            f"{fqn} is {n_out}×{n_in} (out×in) in the model and {b.shape[0]}×{a.shape[1]} in the "
            "file; load the adapter into the model that it was trained on"
        )
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        raise AdapterError(f"{fqn} is on the meta device; load the base weights first")
    assert a.dtype in TRAINABLE_DTYPES
