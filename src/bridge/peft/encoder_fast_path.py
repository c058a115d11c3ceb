"""Keep `nn.TransformerEncoderLayer` from reading the weights of adapted linears.

In evaluation without gradients that module skips its linears' forward and hands their weights to
one fused kernel, which would leave the adapters out without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from bridge.peft.lora_mixin import LoRAMixin

_SAVED = "_activation_before_adapter"


def keep_encoders_off_fast_path(model: nn.Module) -> None:
    """Make every `nn.TransformerEncoderLayer` with an adapted linear call its linears, in place.

    Args:
        model: An adapted model.
    """
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and any(
            isinstance(m, LoRAMixin) for m in layer.modules()
        ):
            setattr(layer, _SAVED, layer.activation_relu_or_gelu)
            # 0 says "an activation that the fused kernel does not know".
            layer.activation_relu_or_gelu = 0


@contextmanager
def encoder_fast_path(model: nn.Module) -> Iterator[None]:
    """Within the context the encoder layers compute as they did before they were adapted.

    Args:
        model: An adapted model.
    """
    layers = [
        m
        for m in model.modules()
        if isinstance(m, nn.TransformerEncoderLayer) and hasattr(m, _SAVED)
    ]
    for layer in layers:
        layer.activation_relu_or_gelu = getattr(layer, _SAVED)
    try:
        yield
    finally:
        for layer in layers:
            layer.activation_relu_or_gelu = 0
