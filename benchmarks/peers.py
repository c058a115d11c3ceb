"""The layers that the benchmarks compare: one frozen base, ours, and four other ways to do it.

Every builder takes a `Case` and returns a module over a weight of the same values: frozen base,
trainable A and B, B not zero, dropout on the branch's input.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridge.peft import patch_linear_module


@dataclass(frozen=True)
class Case:
    """One cell of the grid.

    Attributes:
        tokens: Rows of x.
        in_features: k.
        out_features: n.
        dim: Rank r.
        dropout: Probability, on the branch's input.
        dtype: Of everything.
        device: Of everything.
    """

    tokens: int
    in_features: int
    out_features: int
    dim: int
    dropout: float
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def alpha(self) -> int:
        """Twice the rank, as is usual."""
        return 2 * self.dim

    @property
    def floor(self) -> float:
        """FLOPs over the frozen base's: 1 + 1.5 r (k + n) / (k n)."""
        k, n = self.in_features, self.out_features
        return 1 + 1.5 * self.dim * (k + n) / (k * n)

    def base(self) -> nn.Linear:
        """A frozen linear; the same values at each call."""
        torch.manual_seed(0)
        base = nn.Linear(
            self.in_features, self.out_features, bias=False, device=self.device, dtype=self.dtype
        )
        return base.requires_grad_(False)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """An input that wants a gradient, (8, tokens / 8, in), and a gradient of the output."""
        shape = (8, self.tokens // 8)
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        x = torch.randn(*shape, self.in_features, **options).requires_grad_(True)
        return x, torch.randn(*shape, self.out_features, **options)


class SeedLayer(nn.Module):
    """The formula as the seed's layers state it: the scale on the output, then the sum."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.base = case.base()
        options: dict[str, Any] = {"bias": False, "device": case.device, "dtype": case.dtype}
        self.lora_a = nn.Linear(case.in_features, case.dim, **options)
        self.lora_b = nn.Linear(case.dim, case.out_features, **options)
        self.dropout = nn.Dropout(case.dropout)
        self.scale = case.alpha / case.dim

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        y = F.linear(x, self.base.weight)
        branch = self.lora_b(self.lora_a(self.dropout(x))) * self.scale
        return y + branch


class TorchtuneLayer(SeedLayer):
    """The formula as torchtune writes it: scale first, dropout skipped at probability 0."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        out = F.linear(x, self.base.weight)
        lora_out = self.lora_a(self.dropout(x) if self.dropout.p > 0.0 else x)
        return out + self.scale * self.lora_b(lora_out)


class _LeanBranch(torch.autograd.Function):
    """``base + s B A x``: adds in place and computes A x again in backward, storing only x."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.s = s
        flat = x.reshape(-1, x.shape[-1])
        return base.add_(((flat @ a.t()) @ b.t()).mul_(s).view_as(base))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, a, b = ctx.saved_tensors
        rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dh = (dy_rows @ b).mul_(ctx.s)
        db = (dy_rows.t() @ (rows @ a.t())).mul_(ctx.s)
        return dy, (dh @ a).view_as(x), dh.t() @ rows, db, None


class LeanLayer(SeedLayer):
    """A memory-efficient variant: the branch recomputes A x in backward and adds in place."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        base = F.linear(x, self.base.weight)
        dropped = self.dropout(x) if self.dropout.p > 0.0 else x
        a, b = self.lora_a.weight, self.lora_b.weight
        return _LeanBranch.apply(base, dropped, a, b, self.scale)  # pyright: ignore


def _ours(case: Case, lora_dtype: torch.dtype | None = None) -> nn.Module:
    layer = patch_linear_module(
        case.base(),
        dim=case.dim,
        alpha=case.alpha,
        dropout=case.dropout,
        dropout_position="pre",
        lora_dtype=lora_dtype,
    )
    nn.init.normal_(layer.get_parameter("lora_b.weight"), std=0.02)
    return layer


def _hf_peft(case: Case, lora_dtype: torch.dtype | None = None) -> nn.Module:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(r=case.dim, lora_alpha=case.alpha, lora_dropout=case.dropout)
    layer = Linear(case.base(), "default", config, r=case.dim, lora_alpha=case.alpha)
    for name in ("lora_A", "lora_B"):
        getattr(layer, name).to(lora_dtype or case.dtype)
    nn.init.normal_(layer.get_parameter("lora_B.default.weight"), std=0.02)
    assert layer.get_parameter("lora_A.default.weight").dtype == (lora_dtype or case.dtype)
    return layer.to(case.device)


_LAYERS: dict[str, Callable[[Case], nn.Module]] = {
    "frozen": Case.base,
    "ours": _ours,
    "seed": SeedLayer,
    "peft": _hf_peft,
    "torchtune": TorchtuneLayer,
    "lean": LeanLayer,
}


#: The recipe's default over a 16-bit base, A and B in float32, beside A and B in 16 bits and PEFT's
#: default, which is float32 too.
MIXED: dict[str, Callable[[Case], nn.Module]] = {
    "frozen": Case.base,
    "ours": functools.partial(_ours, lora_dtype=torch.float32),
    "ours, 16 bits": _ours,
    "peft": functools.partial(_hf_peft, lora_dtype=torch.float32),
}


def available() -> dict[str, Callable[[Case], nn.Module]]:
    """Name to builder, "frozen" first, with "peft" where it is installed."""
    installed = importlib.util.find_spec("peft") is not None
    return {name: build for name, build in _LAYERS.items() if installed or name != "peft"}
