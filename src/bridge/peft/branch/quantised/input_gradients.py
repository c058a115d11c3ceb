"""Whether a quantised linear gives its input a gradient: known of some, tried on others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft.branch.quantised.format import Format, input_dtypes
from bridge.peft.branch.quantised.opaque import base_forward

_ROWS = 16
_NO_GRADIENT = "its own forward gives its input no gradient, so layers below it would not learn"
#: What a try found, by class of module and what its packed weight says of itself.
_TRIED: dict[Any, str | None] = {}


def no_gradient_reason(module: nn.Module, form: Format) -> str | None:
    """Why the layers below a quantised linear could not be trained; None if they can.

    Tried once for each class of module and kind of weight, on a few rows and a copy that shares
    the tensors; on `meta` there is nothing to try.

    Args:
        module: A quantised linear, not adapted.
        form: Its format.
    """
    packed = form.packed(module)
    if form.gives_input_gradient or any(t.is_meta for t in form.tensors(packed)):
        return None
    weight = module._parameters.get("weight")
    key = type(module), type(weight), form.kind(packed), form.tensors(packed)[0].device.type
    if key not in _TRIED:
        _TRIED[key] = _try(module, form.tensors(packed)[0].device)
    return _TRIED[key]


def _try(module: nn.Module, device: torch.device) -> str | None:
    forward, failure = base_forward(module), ""
    n_in: int = module.in_features  # pyright: ignore[reportAssignmentType]
    generator = torch.Generator().manual_seed(0)
    for dtype in input_dtypes(module):
        x = torch.randn(_ROWS, n_in, generator=generator).to(device, dtype).requires_grad_()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                out = forward(x)
                if not isinstance(out, Tensor) or not out.requires_grad:
                    return _NO_GRADIENT
                (gradient,) = torch.autograd.grad(out.float().sum(), x, allow_unused=True)
        except Exception as error:  # a kernel fails in ways of its own
            failure = (
                failure
                or f"{str(error).splitlines()[0] if str(error) else type(error).__name__:.100}"
            )
            continue
        if gradient is None or not bool(gradient.isfinite().all()) or not bool(gradient.any()):
            return _NO_GRADIENT
        return None
    return f"its own forward and backward do not run here: {failure}"
