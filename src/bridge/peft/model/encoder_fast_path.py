"""Keep `nn.TransformerEncoderLayer` from reading the weights of adapted linears.

In evaluation without gradients that module skips its linears' forward and hands their weights to
one fused kernel, which would leave the adapters out without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bridge.peft.branch.mixin import LoRAMixin

#: Per class the attribute that opens the fused path, and the value that closes it.
_SWITCHES: dict[type[nn.Module], tuple[str, Any]] = {
    # 0 says "an activation that the fused kernel does not know".
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    # Only the fused path can compute on the nested tensor that this would make.
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_SAVED = "_fast_path_before_adapter"


def keep_encoders_off_fast_path(model: nn.Module) -> None:
    """Make every torch encoder with an adapted linear call its linears' forward, in place.

    Args:
        model: An adapted model.
    """
    for module in model.modules():
        switch = next((s for kind, s in _SWITCHES.items() if isinstance(module, kind)), None)
        if switch and any(isinstance(m, LoRAMixin) for m in module.modules()):
            name, closed = switch
            setattr(module, _SAVED, (name, getattr(module, name), closed))
            setattr(module, name, closed)


def fit_encoders(model: nn.Module) -> None:
    """Let encoders whose adapters are all merged take the fused path again, in place.

    Args:
        model: An adapted model.
    """
    for module in model.modules():
        if _SAVED in vars(module):
            name, opened, closed = vars(module)[_SAVED]
            layers = [m for m in module.modules() if isinstance(m, LoRAMixin)]
            setattr(module, name, opened if all(m.merged for m in layers) else closed)


def passed_by_peft(model: nn.Module) -> list[str]:
    """The encoder layers that PEFT's models compute without their branches in evaluation.

    torch fuses such a layer then. Branches that are zero are no loss.

    Args:
        model: An adapted model.
    """
    return [
        fqn
        for fqn, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        and _SAVED in vars(module)
        and vars(module)[_SAVED][1]  # an activation that the fused kernel knows
        and module.self_attn.batch_first
        and module.self_attn.in_proj_bias is not None
        and any(isinstance(m, LoRAMixin) and not m.is_zero() for m in module.modules())
    ]


def zeroes_padding(model: nn.Module, chosen: Collection[nn.Module]) -> list[str]:
    """The encoders that answer with zeros where their input is padded, until they are adapted.

    Args:
        model: A base model.
        chosen: The modules to adapt.
    """
    return [
        fqn or type(module).__name__
        for fqn, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoder)
        and module.use_nested_tensor
        and not {*module.modules()}.isdisjoint(chosen)
    ]


@contextmanager
def encoder_fast_path(module: nn.Module) -> Iterator[None]:
    """Within the context an encoder of torch computes as it did before it was adapted.

    Args:
        module: Any module of an adapted model.
    """
    if _SAVED not in vars(module):
        yield
        return
    name, opened, _ = vars(module)[_SAVED]
    before = getattr(module, name)  # open already where all is merged
    setattr(module, name, opened)
    try:
        yield
    finally:
        setattr(module, name, before)
