"""What a quantised model of transformers says of itself, while it is trained and while merged."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

from torch import nn

from bridge.peft.branch.dense import DenseLinearAdapter
from bridge.peft.branch.quantised.table import format_of
from bridge.peft.model.walk import adapted_modules, some_names

#: What says of a model itself that it is quantised.
_MARKS = (
    *("hf_quantizer", "quantization_method", "is_quantized"),
    *("is_loaded_in_4bit", "is_loaded_in_8bit"),
)
#: Where a quantisation's config lists the modules that it leaves dense.
_SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")
_SET_ASIDE = "_quantisation_set_aside"


def let_quantised_train(model: nn.Module) -> None:
    """Make a quantised model fit for training, in place, and answer the Trainer that it is.

    Args:
        model: An adapted model; of one that is not quantised nothing changes.
    """
    told: dict[str, list[str]] = {}
    for fqn, module in model.named_modules():
        form = format_of(module)
        if form is not None and (told_of := form.prepare(module)):
            told.setdefault(told_of, []).append(fqn)
    for told_of, fqns in told.items():
        warnings.warn(f"{some_names(fqns)}: {told_of}", stacklevel=4)
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not getattr(quantiser, "is_qat_trainable", True):
        quantiser.__class__ = _trainable_class(type(quantiser))


@functools.cache
def _trainable_class(cls: type) -> type:
    """The quantiser's class, but that it has trainable weights; the name stays."""
    namespace = {"is_qat_trainable": True, "is_trainable": True, "__reduce_ex__": _reduce}
    return type(cls.__name__, (cls,), {**namespace, "__module__": cls.__module__})


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    state = object.__reduce_ex__(self, 2)[2]
    return _new_quantiser, (type(self).__mro__[1],), state


def _new_quantiser(cls: type) -> Any:
    made = _trainable_class(cls)
    return object.__new__(made)


def dense_while_merged(model: nn.Module) -> list[str]:
    """Let a merged model say what it is, in place: `save_pretrained` writes that into its config.

    Where nothing quantised is left it is a dense model; else the merged linears join those that
    the quantisation leaves dense.

    Args:
        model: A merged model, not wrapped.

    Returns:
        What the caller of the merge should know.
    """
    dense = [f for f, m in adapted_modules(model) if isinstance(m, DenseLinearAdapter)]
    if not dense:
        return []
    left = [fqn for fqn, module in model.named_modules() if format_of(module) is not None]
    config: Any = getattr(model, "config", None)
    kept: dict[str, Any] = {"marks": {n: v for n, v in vars(model).items() if n in _MARKS}}
    if hasattr(config, "quantization_config"):
        kept["config"] = config.quantization_config
        if left:
            config.quantization_config = _skipping(config.quantization_config, dense)
        else:
            del config.quantization_config
    if not left:
        for name in kept["marks"]:
            del vars(model)[name]
    vars(model)[_SET_ASIDE] = kept
    if not left:
        return []
    return [f"{some_names(left)}: quantised linears without a branch stay as they are"]


def quantised_again(model: nn.Module) -> None:
    """Undo `dense_while_merged`, in place.

    Args:
        model: A model that was unmerged, not wrapped.
    """
    kept = vars(model).pop(_SET_ASIDE, None)
    if kept is None:
        return
    vars(model).update(kept["marks"])
    if "config" in kept:
        model.config.quantization_config = kept["config"]  # pyright: ignore


def _skipping(config: Any, dense: list[str]) -> Any:
    """A copy of a quantisation's config that leaves these modules dense too."""
    changed = copy.copy(config)
    for name in _SKIPPED:
        if hasattr(changed, name):
            # without a list of its own it leaves the output head alone
            before = getattr(changed, name)
            setattr(changed, name, [*(["lm_head"] if before is None else before), *dense])
    return changed
