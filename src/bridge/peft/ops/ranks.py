"""How the ranks of a group share one branch, as far as its mathematics needs to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor


class GradientSum(Protocol):
    """Adds up the gradient of a factor that is whole on every rank and sees a part of it."""

    def begin(self, gradient: Tensor) -> Callable[[], Tensor]:
        """Begin the sum; the result, called, waits for it and returns it.

        Args:
            gradient: This rank's part, which may be written to.
        """
        ...

    def factor(self, factor: Tensor) -> Tensor:
        """The factor itself; autograd sums its gradient.

        Args:
            factor: A or B.
        """
        ...


class Ranks(NamedTuple):
    """What a rank does differently from a single process.

    Attributes:
        shard: Which of several dropout masks it draws, see `dropout.draw_seed`.
        sum_a: The sum of A's gradient over the ranks; None where each has all of it.
        sum_b: That of B's.
    """

    shard: int = 0
    sum_a: GradientSum | None = None
    sum_b: GradientSum | None = None

    def factors(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """A and B for a formula that autograd differentiates."""
        a = lora_a if self.sum_a is None else self.sum_a.factor(lora_a)
        return a, lora_b if self.sum_b is None else self.sum_b.factor(lora_b)


#: What a second derivative is refused with where the ranks share a branch.
NO_SECOND_DERIVATIVES = (
    "second derivatives (create_graph=True) through a tensor-parallel layer are not computed: each "
    "rank would see a part of them; compute them on one process, or shard with FSDP2"
)
#: A single process.
ALONE = Ranks()
