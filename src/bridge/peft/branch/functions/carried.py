"""What a branch may carry beside A and B: a start that is subtracted, DoRA's magnitude."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge.peft.branch.functions.dora import LoRAMagnitude
from bridge.peft.branch.functions.starts import (
    LoRAStart,
    is_subtracted,
    joined,
    start_of,
)
from bridge.peft.branch.quantised.table import dense_weight
from bridge.peft.ops.dispatch import project
from bridge.peft.ops.magnitude import row_norms, row_squares
from bridge.peft.tensors import full_tensor, is_sharded


class CarriesFunctions(nn.Module):
    """The part of an adapted layer that knows its function; the layer is the rest (`LoRAMixin`).

    Attributes:
        lora_start: A0 and B0, frozen, which are subtracted; of some initialisations only.
        lora_magnitude: DoRA's m, `weight` of shape (out_features,), with `use_dora` only.
    """

    branch_options: Any
    dim: int
    scale: float
    lora_a: Any
    lora_b: Any
    base_weight: Any
    branch_dtype: Any

    def finished(self, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """What the branch's function makes of `W x + b + s · B A x`: DoRA rescales its rows.

        Args:
            out: (..., out_features).
            a: A, (dim, in_features).
            b: B, (out_features, dim).
        """
        magnitude = self.magnitude
        if magnitude is None:
            return out
        return magnitude(out, magnitude.norm(self, a, b, self.scale), self.bias_in_output())

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the update `B A`: with a start that is subtracted, of twice the rank."""
        start = self.start
        return joined(
            self.lora_a.weight, self.lora_b.values, None if start is None else (start.a, start.b)
        )

    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """As `factors`, detached, and gathered where they are sharded: every rank must call."""
        start = self.start
        return joined(
            self.lora_a.whole(),
            self.lora_b.whole(),
            None if start is None else (full_tensor(start.a), full_tensor(start.b)),
        )

    def whole_magnitude(self) -> Tensor | None:
        """DoRA's magnitude, if there is one, gathered likewise: (out_features,)."""
        return None if self.magnitude is None else full_tensor(self.magnitude.weight)

    @property
    def start(self) -> LoRAStart | None:
        """What is subtracted from the branch, if anything is."""
        return self._modules.get("lora_start")  # pyright: ignore[reportReturnType]

    def less_start(self, branch: Tensor, x: Tensor) -> Tensor:
        """A branch that was computed by calls of A and B, less its start on the same input.

        Args:
            branch: (..., out_features).
            x: (..., in_features).
        """
        if self.start is None:
            return branch
        start_a, start_b = self.start()
        return branch - F.linear(F.linear(x, start_a) * self.scale, start_b)

    def set_start(self, seed: int | None) -> None:
        """Take A and B out of the base's weight, as the options say, in place.

        Args:
            seed: Seed of what is drawn; None uses torch's default CPU generator.
        """
        method = self.branch_options.lora_A_init_method
        a, b = start_of(method, self.dense_weight(), self.dim, self.scale, seed)
        with torch.no_grad():
            self.lora_a.weight.copy_(a)
            self.lora_b.weight.copy_(b)
        if is_subtracted(method):
            self.lora_start = LoRAStart(self.lora_a.weight, self.lora_b.weight)

    @property
    def magnitude(self) -> LoRAMagnitude | None:
        """DoRA's magnitude, if the branch has one."""
        return self._modules.get("lora_magnitude")  # pyright: ignore[reportReturnType]

    def reset_magnitude(self) -> None:
        """Set DoRA's magnitude to |W + s · B A|, in place: the output is then that without DoRA.

        A sharded layer is gathered, so with those every rank must call.
        """
        if self.magnitude is None or self.base_weight.is_meta:
            return
        self.weight_was_written()
        if not is_sharded(self.base_weight):
            norm = self.magnitude.norm(self, *self.factors(), self.scale)
        else:
            weight, (a, b) = full_tensor(self.dense_weight()), self.whole_factors()
            norm = row_norms(row_squares(weight), project(weight, a), a, b, self.scale)
        self.magnitude.set_to(norm)

    def bias_in_output(self) -> Tensor | None:
        """The bias that the base's result holds, (out_features,), or None."""
        return getattr(self, "bias", None)

    def called_a_and_b(self) -> tuple[Tensor, Tensor]:
        """A and B by calls of them, for hooks that bring their weights."""
        options: dict[str, Any] = {"dtype": self.branch_dtype, "device": self.base_weight.device}
        n_in = self.lora_a.in_features
        a = self.lora_a(torch.eye(n_in, **options)).t()
        b = self.lora_b(torch.eye(self.dim, **options)).t()
        return joined(a, b, None if self.start is None else self.start())

    def dense_weight(self) -> Tensor:
        """The weight that the base computes with: (out_features, in_features), floating, frozen."""
        return self.oriented(dense_weight(self, self.base_weight))

    def oriented(self, weight: Tensor) -> Tensor:
        """A weight as (out_features, in_features); the layer says where it is stored otherwise."""
        return weight

    def weight_was_written(self) -> None:
        """Called after the base's weight was written in place: forget what was made from it."""
        if self.magnitude is not None:
            self.magnitude.forget()

    def magnitude_is_the_base_s(self) -> bool:
        """Whether DoRA's magnitude is still |W|, or has no values yet, so that it follows W."""
        magnitude, weight = self.magnitude, self.base_weight
        if magnitude is None or not magnitude.is_set:
            return magnitude is not None
        if weight.is_meta or is_sharded(weight) or is_sharded(magnitude.weight):
            return False
        squares = row_squares(self.dense_weight())
        start = squares.sqrt().to(magnitude.weight)
        return torch.equal(start, magnitude.weight) and not bool(self.lora_b.weight.any())

    def follow_base(self) -> None:
        """Set DoRA's magnitude to |W|, where it is a base's that has just been loaded, in place."""
        if self.magnitude is not None and not self.base_weight.is_meta:
            self.magnitude.set_to(row_squares(self.dense_weight()).sqrt())


def carry(
    module: nn.Module,
    start: tuple[Tensor, Tensor] | None,
    magnitudes: int,
    *values: Tensor,
    **placed: Any,
) -> None:
    """Give a module that carries a branch what its function takes beside A and B, in place.

    Args:
        module: It has A and B.
        start: A0 and B0 to subtract, if any.
        magnitudes: DoRA's, one a row of the weight; 0 without it.
        *values: The magnitudes' values, if they are known.
        **placed: Device and dtype.
    """
    if start is not None:
        module.lora_start = LoRAStart(*(t.to(**placed) for t in start))
    if magnitudes:
        known = values[0] if values else None
        module.lora_magnitude = LoRAMagnitude(magnitudes, values=known, **placed)
        module.lora_magnitude.train(module.training)
