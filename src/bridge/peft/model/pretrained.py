"""What an adapted model of transformers says to the code around it: trainers, resizing, kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from bridge.peft.branch.dense import DenseLinearAdapter
from bridge.peft.branch.functions.dora import LoRAMagnitude
from bridge.peft.branch.functions.starts import LoRAStart
from bridge.peft.branch.matrix import LoRAMatrix
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.token_rows import TokenRows, WithTokenRows
from bridge.peft.errors import AdapterError
from bridge.peft.model.quantisation import let_quantised_train
from bridge.peft.model.walk import clean_fqn, input_embedding, output_head
from bridge.peft.tensors import is_plain

#: How transformers marks a parameter that it has loaded.
_MARK = "_is_hf_initialized"
#: What an adapted model remembers: the names of `random_modules` at that time.
_RECORD = "modules_from_no_checkpoint"


def prepare_pretrained(model: nn.Module) -> None:
    """Let trainers train it, in place, and refuse what would lose an adapter without a word.

    Args:
        model: An adapted model; one that is not of transformers is left as it is.
    """
    let_quantised_train(model)
    ends = {"output head": output_head(model), "input embedding": input_embedding(model)}
    kinds = (LoRAMixin, WithTokenRows)
    adapted = [name for name, module in ends.items() if isinstance(module, kinds)]
    if adapted and hasattr(model, "resize_token_embeddings"):
        refuse = functools.partial(_refuse_to_resize, adapted[0])
        vars(model)["resize_token_embeddings"] = refuse


def random_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a loaded model whose parameters are from no checkpoint: random, or resized.

    transformers marks each parameter that it loads. A model without any mark (made from a
    configuration, or copied) tells nothing, and has none. Sharding, and whatever else makes new
    parameters, loses the marks; what was seen when the model was adapted counts from then on.

    Args:
        model: A model, not wrapped.

    Returns:
        By fully qualified name, each as high in the model as all its parameters are random: a
        head of two linears is one module.
    """
    by_name = {clean_fqn(fqn): module for fqn, module in model.named_modules()}
    recorded = {fqn: by_name[fqn] for fqn in vars(model).get(_RECORD, ()) if fqn in by_name}
    if not any(hasattr(parameter, _MARK) for parameter in model.parameters()):
        return recorded
    found: dict[str, nn.Module] = {}
    for fqn, module in model.named_modules():
        inside = any(fqn.startswith(f"{name}.") for name in found)
        parameters = [p for m in module.modules() for p in _own_parameters(m)]
        if fqn and not inside and parameters and not any(_is_loaded(p) for p in parameters):
            found[fqn] = module
    return recorded | {clean_fqn(fqn): module for fqn, module in found.items()}


def remember_random_modules(model: nn.Module, fqns: Iterable[str]) -> None:
    """Let `random_modules` know some modules from now on, in place.

    Args:
        model: A model that has been adapted, not wrapped.
        fqns: Their fully qualified names.
    """
    setattr(model, _RECORD, tuple(fqns))


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    # what a merge made of a quantised weight carries no mark, and is no part of the base
    own = LoRAMatrix | LoRAMagnitude | LoRAStart | TokenRows | DenseLinearAdapter
    if isinstance(module, own):
        return []
    return [p for p in module._parameters.values() if p is not None]


def _is_loaded(parameter: nn.Parameter) -> bool:
    # what a quantiser made is no subject of initialisation, and carries its mark elsewhere
    packed = not is_plain(parameter) or not parameter.is_floating_point()
    return packed or getattr(parameter, _MARK, False)


def _refuse_to_resize(what: str, *args: Any, **kwargs: Any) -> Any:
    raise AdapterError(
        f"resize_token_embeddings would replace the {what}, which is adapted, and lose its "
        "adapter; resize the base model first, then adapt it"
    )
