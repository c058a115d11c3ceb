"""The sum of a factor's gradient over the ranks of a mesh, begun early and waited for late."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from bridge.peft.errors import AdapterError
from bridge.peft.ops.ranks import NO_SECOND_DERIVATIVES

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class SumOverRanks:
    """`ops.ranks.GradientSum` over a mesh of one dimension; half precision is added in float32.

    Args:
        mesh: The ranks.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def begin(self, gradient: Tensor) -> Callable[[], Tensor]:
        """Begin the sum; the result, called, waits for it and returns it.

        Args:
            gradient: This rank's part, which may be written to.
        """
        wide = gradient.float() if gradient.itemsize == 2 else gradient.contiguous()
        work: Any = dist.all_reduce(wide, group=self.mesh.get_group(), async_op=True)

        def finish() -> Tensor:
            work.wait()
            return wide.to(gradient.dtype)

        return finish

    def traced(self, gradient: Tensor) -> Tensor:
        """The sum by DTensor's own functions, which the compiler follows.

        Args:
            gradient: This rank's part.
        """
        from torch.distributed.tensor import DTensor, Partial, Replicate

        part = DTensor.from_local(gradient, self.mesh, [Partial()], run_check=False)
        return part.redistribute(placements=[Replicate()]).to_local()

    def factor(self, factor: Tensor) -> Tensor:
        """The factor itself; autograd sums its gradient.

        Args:
            factor: A or B.
        """
        return _Summed.apply(factor, self)  # pyright: ignore[reportReturnType]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: Tensor, ranks: SumOverRanks) -> Tensor:  # pyright: ignore
        ctx.ranks = ranks
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if torch.compiler.is_compiling():
            return ctx.ranks.traced(gradient), None
        if torch.is_grad_enabled():
            raise AdapterError(NO_SECOND_DERIVATIVES)
        return ctx.ranks.begin(gradient.clone())(), None
