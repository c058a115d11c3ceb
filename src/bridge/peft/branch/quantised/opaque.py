"""Packed linears that nothing is known of but what they compute: GPTQ, AWQ, HQQ, and what comes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft.branch.quantised.format import Format, class_names, input_dtypes, of_library
from bridge.peft.errors import AdapterError

#: Rows that show whether a packed linear is one.
_ROWS = 16
#: How far, of its own dtype's precision, its answer may be from that of the weight it shows.
_TOLERANCE = 64
_NOT_STORED = frozenset(vars(nn.Module()))
_NOT_PACKED = ("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt")


class Opaque(Format):
    """A linear whose values are integers in a layout of its own; packed is the module.

    Its forward is a linear map, so the weight is what it answers to the unit vectors, and that is
    exactly what it computes with.
    """

    library = "a quantised linear"

    def holds(self, module: nn.Module) -> bool:
        """Whether it knows its widths and stores more than a handful of integers, or float8."""
        widths = [getattr(module, name, None) for name in ("in_features", "out_features")]
        if not all(isinstance(n, int) for n in widths) or class_names(module) & {*_NOT_PACKED}:
            return False
        return any(_is_packed(tensor) for tensor in _own(module))

    def packed(self, module: nn.Module) -> nn.Module:
        """The module."""
        return module

    def label(self, module: nn.Module) -> str:
        """As a format's, with the module's own library."""
        return f"{self.kind(module)} ({of_library(module)})"

    def kind(self, packed: Any) -> str:
        """`"4 bits"` where it says so, else `"packed"`."""
        bits = next(
            (b for n in ("bits", "w_bit", "nbits") if (b := getattr(packed, n, None))), None
        )
        return f"{bits} bits" if isinstance(bits, int) else "packed"

    def tensors(self, packed: Any) -> list[Tensor]:
        """All tensors of the module, the packed ones first."""
        return sorted(_own(packed), key=lambda tensor: not _is_packed(tensor))

    @torch.no_grad()
    def dense(self, packed: Any) -> Tensor:
        """The weight as the module's forward shows it, in the dtype of its answer.

        Raises:
            AdapterError: Its forward is not `W x + b`.
        """
        forward, n_in = base_forward(packed), packed.in_features
        device = self.tensors(packed)[0].device
        bias = _answer_to_zeros(forward, torch.zeros(1, n_in, device=device), input_dtypes(packed))
        dtype = bias.dtype
        weight = (forward(torch.eye(n_in, dtype=dtype, device=device)) - bias).t().contiguous()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_ROWS, n_in, generator=generator).to(device, dtype)
        got, expected = forward(x).float(), x.float() @ weight.float().t() + bias.float()
        allowed = _TOLERANCE * torch.finfo(got.dtype).eps * float(expected.abs().max())
        allowed = max(allowed, _TOLERANCE * torch.finfo(dtype).eps * float(expected.abs().max()))
        if not torch.allclose(got, expected, rtol=0.0, atol=allowed):
            raise AdapterError(
                f"a {base_type_of(packed).__name__} of {of_library(packed)} answers otherwise than "
                "W x + b with the weight that it shows (it quantises its input too); keep it "
                "unmerged"
            )
        return weight


def _answer_to_zeros(forward: Any, zeros: Tensor, dtypes: list[torch.dtype]) -> Tensor:
    """The bias, in the first of these dtypes in which the forward runs and answers."""
    *others, last = dtypes
    for dtype in others:
        with contextlib.suppress(RuntimeError):
            if (bias := forward(zeros.to(dtype))).dtype == dtype:
                return bias
    return forward(zeros.to(last)).to(last)


def base_forward(module: nn.Module) -> Any:
    """The forward of a packed module without branch and hooks, on a copy that shares its tensors.

    Args:
        module: Adapted or not; what its forward sets on it is set on the copy.
    """
    base_type = base_type_of(module)
    shadow = object.__new__(base_type)
    vars(shadow).update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        vars(shadow)[name] = dict(vars(module)[name])
    return lambda *args: base_type.forward(shadow, *args)


def base_type_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was adapted.

    Args:
        module: Any module.
    """
    return getattr(module, "base_type", type(module))


def _own(module: nn.Module) -> list[Tensor]:
    """The tensors of a module, without those of its children, which may be A and B."""
    named = {**module._parameters, **module._buffers}
    for name, value in vars(module).items():  # HQQ keeps its scales in a dict, SpQR as attributes
        if name not in _NOT_STORED:
            named |= value if isinstance(value, dict) else {name: value}
    return [t for name, t in named.items() if isinstance(t, Tensor) and name != "bias"]


def _is_packed(tensor: Tensor) -> bool:
    is_narrow = not tensor.is_floating_point() or tensor.dtype.itemsize == 1
    return is_narrow and not tensor.is_complex() and tensor.dim() >= 2 and tensor.numel() >= 16
