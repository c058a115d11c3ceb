"""A or B of a branch, with the one method that may reset it: whole, or this rank's part."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge.peft.branch.initializers import initialize
from bridge.peft.errors import UnsupportedLinearError
from bridge.peft.parallel.layout import placed
from bridge.peft.parallel.megatron import mark
from bridge.peft.parallel.shard import Shard
from bridge.peft.tensors import full_tensor, is_sharded, sharded_like

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement


#: Parts of a matrix, each as (first row, end, first column, end).
Blocks = tuple[tuple[int, int, int, int], ...]
#: The `init_method` of a matrix whose values come from elsewhere: a weight, a file.
GIVEN = "given"


class LoRAMatrix(nn.Module):
    """One of the two matrices of a branch, with the one method that may reset it.

    It is not an `nn.Linear`, so that code which sweeps over linears (weight initialisation,
    quantisation, target matching) leaves it alone; `B` stays zero until it is trained.

    Attributes:
        weight: (out_features, in_features), trainable; (experts, out_features, in_features) of
            a branch on a stack of weights.
        init_method: `"xavier"`, `"uniform"`, `"normal"`, `"zeros"`, or `GIVEN`.
        seed: Seed of the draw; None uses torch's default CPU generator.
        blocks: What of the weight is not zero, as (first row, end, first column, end); None for
            all of it.

    Args:
        values: To start from instead of a draw; of the weight's shape.
        stack: () for one matrix, (experts,) for a stack of them.
    """

    weight: nn.Parameter
    mask: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        init_method: str,
        *,
        seed: int | None = None,
        values: Tensor | None = None,
        stack: tuple[int, ...] = (),
        blocks: Blocks | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.init_method = init_method
        self.seed = seed
        self.blocks = blocks
        self.weight = nn.Parameter(
            torch.empty((*stack, out_features, in_features), device=device, dtype=dtype)
        )
        if values is None:
            self.reset_parameters()
        else:
            with torch.no_grad():
                self.weight.copy_(values)
        mask = None if blocks is None else torch.empty(self.weight.shape, device="meta")
        self.register_buffer("mask", mask, persistent=False)
        self._set_mask()

    def _set_mask(self) -> None:
        if self.blocks is not None:
            mask = torch.zeros(self.out_features, self.in_features, dtype=torch.bool, device="cpu")
            for top, bottom, left, right in self.blocks:
                mask[top:bottom, left:right] = True
            self.mask = mask.to(self.weight.device)

    @property
    def values(self) -> Tensor:
        """The weight to compute with: zero outside the blocks, to which no gradient gets."""
        return self.weight if self.mask is None else self.weight * self.mask

    def reset_parameters(self) -> None:
        """Draw the initial values again (zero for B), in place; NaN where they were not drawn."""
        if self.init_method == GIVEN:
            with torch.no_grad():
                self.weight.fill_(torch.nan)
            return
        initialize(self.weight, self.init_method, self.seed)

    def place(self, mesh: DeviceMesh, placement: Placement, *, alike: bool) -> None:
        """Keep this rank's part of the weight, as a DTensor, in place.

        Args:
            mesh: The ranks, of one dimension.
            placement: What each of them keeps.
            alike: Whether all ranks hold the same values; the first one's count otherwise.
        """
        if self.blocks is not None:
            raise UnsupportedLinearError(
                "parts of a projection that tensor parallelism has cut cannot be adapted alone; "
                "leave out parts"
            )
        if not is_sharded(self.weight):
            self.weight = placed(self.weight, mesh, placement, alike=alike)

    def whole(self) -> Tensor:
        """All of the matrix, detached; where it is sharded a collective: every rank must call."""
        return full_tensor(self.weight)

    @torch.no_grad()
    def set_whole(self, values: Tensor) -> None:
        """Take new values, in place.

        Args:
            values: All of the matrix, alike on every rank.
        """
        self.weight.copy_(sharded_like(values.to(self.weight.dtype), self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """`x Wᵀ`: (..., in_features) -> (..., out_features); an index stands for a one-hot row."""
        return (
            F.linear(x, self.values) if x.is_floating_point() else F.embedding(x, self.weight.t())
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to_empty` after `meta` would leave whatever the memory held before.
        was_meta = self.weight.device.type == "meta"
        super()._apply(fn, recurse)
        if was_meta:
            self.reset_parameters()
            self._set_mask()
        return self

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.in_features}, {self.out_features}, init={self.init_method!r}"


class ShardedMatrix(LoRAMatrix):
    """This rank's part of A or B; the whole is drawn from the seed, then cut.

    Args:
        in_features: Columns of the whole matrix.
        out_features: Rows of the whole matrix.
        init_method: `"xavier"`, `"uniform"` or `"zeros"`.
        shard: Which part this rank holds.
        like: The base's weight, for the device and Megatron's marks.
        dtype: Of the matrix.
        seed: Of the draw; None uses torch's default CPU generator.
        values: The whole matrix, to start from instead of a draw.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        init_method: str,
        shard: Shard,
        *,
        like: Tensor,
        dtype: torch.dtype,
        seed: int | None = None,
        values: Tensor | None = None,
    ) -> None:
        if values is None:
            values = torch.empty((out_features, in_features), dtype=dtype, device="cpu")
            initialize(values, init_method, seed)
        part = shard.cut(values)
        rows, columns = part.shape
        super().__init__(
            columns, rows, init_method, seed=seed, values=part, device=like.device, dtype=dtype
        )
        self.shard = shard
        self.allreduce: bool = getattr(like, "allreduce", True)
        mark(self.weight, shard, self.allreduce)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values of the whole again and keep this rank's part, in place."""
        if self.weight.is_meta:
            return
        shape = self.shard.shape((self.out_features, self.in_features))
        whole = torch.empty(shape, dtype=self.weight.dtype, device="cpu")
        initialize(whole, self.init_method, self.seed)
        self.set_whole(whole)

    def whole(self) -> Tensor:
        """All of the matrix, detached; a collective, so every rank must call."""
        return self.shard.joined(self.weight)

    @torch.no_grad()
    def set_whole(self, values: Tensor) -> None:
        """Take this rank's part of new values, in place.

        Args:
            values: All of the matrix.
        """
        self.weight.copy_(self.shard.cut(values))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        mark(self.weight, self.shard, self.allreduce)  # a parameter that left meta is a new one
        return self
