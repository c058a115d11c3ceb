"""The adapter of a model, described as a PEFT file would hold it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from bridge.peft.branch.kinds.embedding import EmbeddingAdapter
from bridge.peft.branch.kinds.experts import ParameterBranch
from bridge.peft.branch.kinds.read_linear import ReadLinearAdapter
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.token_rows import WithTokenRows
from bridge.peft.errors import AdapterError
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.attention import attentions, in_file
from bridge.peft.formats.peft.config import alpha_for, new_config, scale_of
from bridge.peft.formats.peft.experts import misread_by_peft
from bridge.peft.formats.peft.fingerprint import fingerprint
from bridge.peft.formats.peft.kernels import kernel_of
from bridge.peft.formats.peft.names import choose_targets
from bridge.peft.formats.peft.quantised_base import FIELD, quantised_groups
from bridge.peft.formats.peft.saved_whole import whole_of
from bridge.peft.formats.peft.target_parameters import choose_entries
from bridge.peft.model.encoder_fast_path import passed_by_peft
from bridge.peft.model.participation import check_still_adapted
from bridge.peft.model.walk import (
    adapted_modules,
    base_modules,
    clean_fqn,
    output_head,
    some_names,
    token_rows_of,
    unwrap,
)
from bridge.peft.tensors import full_tensor
from bridge.peft.version import __version__


def adapter_of(model: nn.Module) -> AdapterFile:
    """The adapter of a model as a PEFT file would hold it; tensors share the model's storage.

    Args:
        model: An adapted model, possibly inside `DistributedDataParallel` or compiled.

    Raises:
        AdapterError: The model has no adapters, or something that a PEFT file cannot hold.
    """
    root = unwrap(model)
    check_still_adapted(root)
    layers = _layers(root)
    whole_attentions = attentions(layers)
    # by which name the config means each branch
    means = {fqn: fqn for fqn in layers}
    means |= {fqn: name for name, pair in whole_attentions.items() for fqn in pair}
    alone = {fqn: layer for fqn, layer in layers.items() if means[fqn] == fqn}
    parameters = [fqn for fqn, layer in alone.items() if isinstance(layer, ParameterBranch)]
    linears = {fqn: layer for fqn, layer in alone.items() if fqn not in parameters}
    modules = [*linears, *whole_attentions]
    others = [fqn for fqn in base_modules(root) if fqn and fqn not in {*layers, *modules}]
    _warn(
        _moved(alone, output_head(root)),
        "the model reads these weights past their linears, where PEFT's adapters have no effect",
    )
    _warn(
        passed_by_peft(root),
        "in evaluation torch hands these weights to a fused kernel, where PEFT's adapters have no "
        "effect",
    )
    _warn(
        misread_by_peft(root, linears),
        "PEFT takes linears of these names for the experts' in this architecture, and cannot read "
        "them",
    )
    use_rslora, alphas = _scaling(layers)
    branches = {fqn: _branch(layer) for fqn, layer in layers.items()}
    common = Counter(tuple(b.items()) for b in branches.values()).most_common(1)[0][0]
    extra: dict[str, Any] = {"bridge_peft_version": __version__, **dict(common)}
    dropout = extra.pop("dropout")
    if extra["rows"] is None:
        del extra["rows"]
    exceptions = {fqn: b for fqn, b in branches.items() if tuple(b.items()) != common}
    if exceptions:
        extra["exceptions"] = exceptions
    extra["base"] = fingerprint(layers)
    magnitudes = _magnitudes(layers)
    if groups := quantised_groups(root):
        extra[FIELD] = groups
    whole, fields = whole_of(root, layers, others)
    if parameters:
        fields["target_parameters"] = choose_entries(parameters, _other_parameters(root, layers))
        extra["parameters"] = _by_module(parameters)
        # PEFT refuses the file with another value, and computes no dropout there
        extra["dropout"], dropout = dropout, 0.0
    tokens = _token_rows(root)
    if tokens:
        indices = {fqn: list(module.rows.tokens) for fqn, module in tokens.items()}
        fields["trainable_token_indices"] = indices
    config = new_config(
        {means[fqn]: file_rank(layer) for fqn, layer in layers.items()},
        {means[fqn]: alpha for fqn, alpha in alphas.items()},
        choose_targets(modules, others) if modules else [],
        lora_dropout=dropout,
        use_rslora=use_rslora,
        use_dora=bool(magnitudes),
        fan_in_fan_out=_fan_in_fan_out(linears),
        base_model_name_or_path=getattr(getattr(root, "config", None), "_name_or_path", None)
        or None,
        task_type=_task_type(root),
        **fields,
    )
    tensors = {fqn: layer.whole_factors() for fqn, layer in layers.items()}
    adapter = AdapterFile(
        config=config,
        tensors=tensors,
        magnitudes=magnitudes,
        extra=extra,
        whole=whole,
        parameters={f for f, m in layers.items() if isinstance(m, ParameterBranch)},
        embeddings={f for f, m in layers.items() if isinstance(m, EmbeddingAdapter)},
        kernels={fqn: k for fqn, m in layers.items() if (k := kernel_of(m)) is not None},
        tokens={fqn: full_tensor(m.rows.weight) for fqn, m in tokens.items()},
    )
    return in_file(adapter, whole_attentions)


def _other_parameters(model: nn.Module, layers: Mapping[str, LoRAMixin]) -> list[str]:
    names = (clean_fqn(name) for name, _ in model.named_parameters(remove_duplicate=False))
    return [name for name in names if name not in layers]


def _by_module(parameters: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for fqn in parameters:
        module, _, name = fqn.rpartition(".")
        found.setdefault(module, []).append(name)
    return found


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
        if not module.adapter_enabled:
            raise AdapterError(f"{fqn} is switched off; leave disable_adapters before you save")
        layers[fqn] = module
    if not layers:
        raise AdapterError("the model has no adapters to save; LoRA(...)(model) adds them")
    return layers


def _token_rows(model: nn.Module) -> dict[str, WithTokenRows]:
    found = dict(token_rows_of(model))
    for fqn, module in found.items():
        if module.rows.weight.is_meta:
            raise AdapterError(f"{fqn} is on the meta device and has no values to save; load them")
        if not module.adapter_enabled:
            raise AdapterError(f"{fqn} is switched off; leave disable_adapters before you save")
    return found


def _fan_in_fan_out(layers: dict[str, LoRAMixin]) -> bool:
    """Whether PEFT must turn the weights; of an embedding it knows which way round that lies."""
    turned = [m.transposed for m in layers.values() if not isinstance(m, EmbeddingAdapter)]
    return bool(turned) and all(turned)


def file_rank(layer: LoRAMixin) -> int:
    """The rank of a layer's update in a file, in which a start is subtracted by more of A and B.

    Args:
        layer: An adapted layer.
    """
    return layer.dim if layer.start is None else 2 * layer.dim


def _magnitudes(layers: dict[str, LoRAMixin]) -> dict[str, Tensor]:
    """DoRA's magnitudes: of all layers, or of none."""
    found = {f: m.magnitude for f, m in layers.items() if m.magnitude is not None}
    if without := [fqn for fqn in layers if found and fqn not in found]:
        raise AdapterError(
            f"{without[0]} has no magnitude and {next(iter(found))} has one (DoRA), and PEFT files "
            "have one flag for all modules; adapt them alike"
        )
    if unset := [fqn for fqn, magnitude in found.items() if not magnitude.is_set]:
        raise AdapterError(
            f"the magnitude of {unset[0]} (DoRA) has no values; load the base weights, or call "
            "reset_magnitude() of the layer"
        )
    return {fqn: m for fqn, layer in layers.items() if (m := layer.whole_magnitude()) is not None}


def _moved(layers: dict[str, LoRAMixin], head: nn.Module | None) -> list[str]:
    """The read linears whose branches are not zero; the head is read by losses alone."""
    read = [f for f, m in layers.items() if isinstance(m, ReadLinearAdapter) and m is not head]
    return [fqn for fqn in read if not layers[fqn].is_zero()]


def _warn(fqns: list[str], reason: str) -> None:
    """Say which branches other readers of the file leave out, and why."""
    if fqns:
        warnings.warn(
            f"{some_names(fqns)}: {reason}; read the file with bridge.peft, or merge it",
            stacklevel=4,
        )


def _scaling(layers: dict[str, LoRAMixin]) -> tuple[bool, dict[str, float]]:
    """Whether the scales are rank-stabilised, and the alphas that give exactly these scales."""
    use_rslora = all(m.branch_options.use_rslora for m in layers.values())
    return use_rslora, {
        fqn: layer.alpha
        if layer.scale == scale_of(layer.alpha, file_rank(layer), use_rslora)
        else alpha_for(layer.scale, file_rank(layer), use_rslora)
        for fqn, layer in layers.items()
    }


def _branch(layer: LoRAMixin) -> dict[str, Any]:
    return {
        "dropout": layer.dropout.p,
        "dropout_position": layer.dropout_position,
        "rows": layer.branch_options.rows,
        "lora_A_init_method": layer.branch_options.lora_A_init_method,
        "freeze_a": layer.branch_options.freeze_a,
    }


def _task_type(model: nn.Module) -> str | None:
    """The PEFT class that wraps such a model well; None for the general one."""
    name = type(model).__name__
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None  # PEFT's task classes ask for it
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    takes_text = getattr(model, "main_input_name", None) == "input_ids"
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if is_pair and takes_text else None
