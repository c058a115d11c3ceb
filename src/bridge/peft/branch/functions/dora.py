"""DoRA: the branch gives the weight's direction, and a trained vector its magnitude by rows.

    y = m / |W + s B A| · (W x + s B A x) + b

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024 (arXiv:2402.09353). m starts as
|W|, so the output is the base's bit for bit, and the norm counts as a constant in backward
(section 4.3). In training with dropout the base's product sees no dropout; PEFT's computes it
a second time, of the dropped input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from bridge.peft.errors import AdapterError
from bridge.peft.ops.dispatch import choose_path, project, rescale, without_autocast
from bridge.peft.ops.magnitude import row_norms, row_squares
from bridge.peft.tensors import is_sharded, sharded_like, write_count


class Base(Protocol):
    """What a magnitude asks of the layer that it belongs to."""

    @property
    def base_weight(self) -> Tensor:
        """The base's own weight, as the base stores it."""
        ...

    def dense_weight(self) -> Tensor:
        """The weight that the base computes with: (out_features, in_features), floating."""
        ...


class LoRAMagnitude(nn.Module):
    """DoRA's m, and the norms that it is divided by.

    |W|² is computed once per value of W (told by its identity and by writes that torch counts), and
    W Aᵀ whenever A has changed (told by its values; on a GPU in training at every call, which costs
    less than to wait for the answer).

    Attributes:
        weight: m, (out_features,), trainable.
        is_set: False while m has no values: made on `meta`, and no base loaded since.

    Args:
        out_features: Rows of the weight.
        values: (out_features,), to start from; None leaves m unset.
    """

    weight: nn.Parameter

    def __init__(
        self,
        out_features: int,
        *,
        values: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.full((out_features,), torch.nan, device=device, dtype=dtype)
        )
        self.is_set = False
        self._known = _Known()
        if values is not None:
            self.set_to(values)

    @torch.no_grad()
    def set_to(self, values: Tensor) -> None:
        """Give m values, in place; on `meta` it keeps having none.

        Args:
            values: (out_features,).
        """
        if not self.weight.is_meta and not values.is_meta:
            if not is_sharded(values):
                values = sharded_like(values.to(self.weight.dtype), self.weight)
            self.weight.copy_(values)
            self.is_set = True

    def forward(self, out: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
        """Rescale `W x + b + s B A x` row by row.

        Args:
            out: (..., out_features).
            norm: What `norm` gave, (out_features,).
            bias: What of `out` is not rescaled, (out_features,), or None.

        Raises:
            AdapterError: m has no values.
        """
        self._check_set()
        return rescale(out, self.weight, norm, bias)

    def norm(self, base: Base, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """|W + s B A| by rows, (out_features,), without a gradient.

        Args:
            base: The layer.
            a: A, (dim, in_features).
            b: B, (out_features, dim).
            scale: Factor of the branch.

        Raises:
            AdapterError: The weight is not whole.
        """
        if is_sharded(base.base_weight):
            raise AdapterError(
                "DoRA needs the norms of the weight's whole rows, and the weight is a DTensor in "
                "forward (tensor parallel); FSDP2 gathers it"
            )
        may_ask = a.device.type == "cpu" or not torch.is_grad_enabled()
        with torch.no_grad(), without_autocast(a.device):
            if choose_path(a, b, plain_linear=False).name == "reference":
                weight = base.dense_weight()
                squares, projected = row_squares(weight), project(weight, a)
            else:
                squares, projected = self._known.of(base, a, may_ask=may_ask)
            return row_norms(squares, projected, a, b, scale)

    def forget(self) -> None:
        """Compute the norms of W again: call it where W changed in a way that torch counts not."""
        self._known = _Known()

    def _check_set(self) -> None:
        if self.is_set:
            return
        if bool(self.weight.isnan().any()):
            raise AdapterError(
                "DoRA's magnitude has no values: the branch was made on meta, and the base weights "
                "came in a way that it was not told of; call reset_magnitude() of each adapted "
                "layer once they are there, or load them with load_state_dict"
            )
        self.is_set = True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}weight" in state_dict:
            self.is_set = not self.weight.is_meta

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to_empty` after `meta` would leave whatever the memory held before.
        was_meta = self.weight.device.type == "meta"
        super()._apply(fn, recurse)
        self.forget()
        if was_meta:
            with torch.no_grad():
                self.weight.fill_(torch.nan)
            self.is_set = False
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": _Known()}

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.weight.shape[0]}"


class _Known:
    """The squares of W's rows and W Aᵀ, each as long as what it was made from stays."""

    def __init__(self) -> None:
        self._weight: weakref.ref[Tensor] | None = None
        self._count = 0
        self._squares: Tensor | None = None
        self._a: Tensor | None = None
        self._projected: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> _Known:
        return _Known()

    def of(self, base: Base, a: Tensor, *, may_ask: bool) -> tuple[Tensor, Tensor]:
        """|W|² by rows and W Aᵀ; `may_ask`: whether A's values may be looked at."""
        # not as tensors of inference mode, which could not be saved for a later backward; leaving
        # that mode turns gradients on
        with torch.inference_mode(False), torch.no_grad():
            own, dense = base.base_weight, None
            if not self._is_of(own):
                dense = base.dense_weight()
                self._squares, self._projected = row_squares(dense), None
                self._weight, self._count = weakref.ref(own), write_count(own)
            squares, projected = self._squares, self._projected
            known = projected is not None and may_ask and self._a is not None
            if not (known and _is_same(a, self._a)):
                projected = project(base.dense_weight() if dense is None else dense, a)
                self._projected = projected
                self._a = a.detach().clone() if may_ask else None
        assert squares is not None and projected is not None
        return squares, projected

    def _is_of(self, weight: Tensor) -> bool:
        same = self._weight is not None and self._weight() is weight
        return same and self._count == write_count(weight)


def _is_same(a: Tensor, other: Tensor | None) -> bool:
    if other is None or (a.dtype, a.device) != (other.dtype, other.device):
        return False
    return torch.equal(a, other)
