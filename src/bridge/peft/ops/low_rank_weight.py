"""A weight that reads as `W + s · L R` to the code that multiplies with it.

    weight = LowRankWeight(W, L, R, how)
    F.linear(x, weight[3])     # x W[3]ᵀ + s (x R[3]ᵀ) L[3]ᵀ, by the products of a LoRA linear

A module that holds its weights as parameters (a stack of experts) takes one out of the stack, may
turn it, and multiplies with it. Here each of these steps acts on the three tensors, and the update
`L R` is never formed. What is no such step is refused by name: nothing is computed without
the branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge.peft.errors import AdapterError
from bridge.peft.ops.dispatch import lora_linear
from bridge.peft.ops.grouped import lora_batched_add, lora_grouped


class How(NamedTuple):
    """What is common to all parts of a weight: the branch's settings, and its name for messages."""

    name: str
    scale: float
    dropout: float = 0.0
    position: str = "pre"

    @property
    def settings(self) -> tuple[float, float, str]:
        """Scale, dropout and its position, as the branch's functions take them."""
        return self.scale, self.dropout, self.position


#: What is asked of a weight without computing with it.
_METADATA = frozenset(
    ("shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "layout", "requires_grad")
)
#: Methods that answer with such things.
_QUESTIONS = frozenset(
    ("size", "dim", "numel", "element_size", "is_floating_point", "is_contiguous", "get_device")
)


class _NoSuchUse(AdapterError, AttributeError):
    """A use that a branch cannot take part in; `hasattr` then answers False, as for any lack."""


class LowRankWeight:
    """`base + scale · left right`, for code that indexes it, turns it and multiplies with it.

    Attributes:
        base: W, (..., rows, columns) with at most one dimension before: that of the stack.
        left: L, (..., rows, dim).
        right: R, (..., dim, columns).
        how: The rest.
    """

    def __init__(self, base: Tensor, left: Tensor, right: Tensor, how: How) -> None:
        self.base, self.left, self.right, self.how = base, left, right, how
        self._items: list[LowRankWeight] | None = None

    def _with(self, base: Tensor, left: Tensor, right: Tensor) -> LowRankWeight:
        return LowRankWeight(base, left, right, self.how)

    # -- parts of a stack

    def __getitem__(self, index: Any) -> LowRankWeight:
        if self.base.dim() != 3 or isinstance(index, tuple) or index is None or index is Ellipsis:
            raise self._refusal(f"[{index!r:.40}]")
        if _is_one(index) and not torch.compiler.is_compiling():
            return self.unbind()[int(index)]
        return self._with(self.base[index], self.left[index], self.right[index])

    def __len__(self) -> int:
        return self.base.shape[0]

    def __iter__(self) -> Iterator[LowRankWeight]:
        return iter(self.unbind())

    def unbind(self, dim: int = 0) -> Sequence[LowRankWeight]:
        """The weights of the stack, one by one."""
        if dim != 0 or self.base.dim() != 3:
            raise self._refusal(f"unbind({dim})")
        if self._items is None:
            # all at once: the gradient of one index would be a stack of zeros with one item in it
            parts = (self.base.unbind(), self.left.unbind(), self.right.unbind())
            self._items = [self._with(*part) for part in zip(*parts, strict=True)]
        return self._items

    # -- the other way round, in another dtype

    @property
    def mT(self) -> LowRankWeight:
        """Each matrix turned: `(W + s L R)ᵀ = Wᵀ + s Rᵀ Lᵀ`."""
        return self._with(self.base.mT, self.right.mT, self.left.mT)

    @property
    def T(self) -> LowRankWeight:
        """A single matrix turned."""
        return self.t()

    def t(self) -> LowRankWeight:
        """A single matrix turned."""
        if self.base.dim() != 2:
            raise self._refusal("t()")
        return self.mT

    def transpose(self, first: int, second: int) -> LowRankWeight:
        """Each matrix turned; the dimension of the stack stays where it is."""
        count = self.base.dim()
        if {first % count, second % count} != {count - 2, count - 1}:
            raise self._refusal(f"transpose({first}, {second})")
        return self.mT

    def permute(self, *dims: Any) -> LowRankWeight:
        """As `transpose`, in the other spelling."""
        order = tuple(dims[0]) if len(dims) == 1 else dims
        if order != (0, 2, 1)[-self.base.dim() :] and order != (1, 0):
            raise self._refusal(f"permute{order}")
        return self.mT

    def contiguous(self) -> LowRankWeight:
        """The same, W in one piece."""
        return self._with(self.base.contiguous(), self.left, self.right)

    def to(self, *args: Any, **kwargs: Any) -> LowRankWeight:
        """W in another dtype or elsewhere; L and R stay in their own dtype."""
        base = self.base.to(*args, **kwargs)
        return self._with(base, self.left.to(base.device), self.right.to(base.device))

    def type(self, dtype: torch.dtype) -> LowRankWeight:
        """W in another dtype."""
        return self.to(dtype)

    def type_as(self, other: Tensor) -> LowRankWeight:
        """W in the dtype of another tensor."""
        return self.to(other.dtype)

    def float(self) -> LowRankWeight:
        """W in float32."""
        return self.to(torch.float32)

    def bfloat16(self) -> LowRankWeight:
        """W in bfloat16."""
        return self.to(torch.bfloat16)

    def half(self) -> LowRankWeight:
        """W in float16."""
        return self.to(torch.float16)

    # -- products

    def matmul(self, x: Tensor) -> Tensor:
        """`(W + s L R) x`, the weight on the left."""
        if not self._fits(x):
            raise self._refusal("weight @ x")
        base_out = torch.bmm(self.base, x).mT
        factors = self.right.mT, self.left.mT
        return lora_batched_add(base_out, x.mT, *factors, *self.how.settings).mT

    def _fits(self, x: Any) -> bool:
        """Whether x is a batch of matrices, one for each of the stack."""
        is_batch = isinstance(x, Tensor) and x.dim() == 3 and self.base.dim() == 3
        return is_batch and x.shape[0] == self.base.shape[0]

    bmm = __matmul__ = matmul

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        weight = next(_weights_in((args, kwargs)))
        if name in _PRODUCTS and len(args) > 1 and isinstance(args[1], LowRankWeight):
            answer = _PRODUCTS[name](func, *args, **kwargs)
        elif name in ("bmm", "matmul") and args[:1] == (weight,) and len(args) == 2 and not kwargs:
            answer = weight.matmul(args[1])
        elif name in _STEPS and args[:1] == (weight,):
            answer = getattr(weight, name)(*args[1:], **kwargs)
        else:
            answer = NotImplemented
        if answer is NotImplemented:
            raise weight._refusal(f"torch's {name}")
        return answer

    def __getattr__(self, name: str) -> Any:
        if name in _METADATA or name in _QUESTIONS:
            return getattr(self.base, name)
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refusal(f".{name}")

    def __repr__(self) -> str:
        return f"LowRankWeight({self.how.name}, {tuple(self.base.shape)})"

    def _refusal(self, use: str) -> AdapterError:
        return _NoSuchUse(
            f"{self.how.name} is adapted, and its module uses it in {use}, where a branch cannot "
            "take part; choose another implementation (model.set_experts_implementation('eager')), "
            "or leave it out of target_parameters"
        )


#: Functions of torch that are methods here.
_STEPS = frozenset(("transpose", "permute", "t", "unbind"))


def _weights_in(arguments: Any) -> Iterator[LowRankWeight]:
    """The weights among the arguments of a function, those in lists included."""
    if isinstance(arguments, LowRankWeight):
        yield arguments
    elif isinstance(arguments, Mapping):
        yield from _weights_in(tuple(arguments.values()))
    elif isinstance(arguments, tuple | list):
        for argument in arguments:
            yield from _weights_in(argument)


def _is_one(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.dim() == 0 and not index.is_floating_point() and index.dtype != torch.bool
    return isinstance(index, int) and not isinstance(index, bool)


def _linear(func: Any, x: Tensor, weight: LowRankWeight, bias: Tensor | None = None) -> Any:
    if weight.base.dim() != 2 or isinstance(bias, LowRankWeight):
        return NotImplemented
    factors = weight.right, weight.left
    return lora_linear(x, weight.base, bias, *factors, *weight.how.settings)


def _matmul(func: Any, x: Any, weight: LowRankWeight) -> Any:
    if not isinstance(x, Tensor):
        return NotImplemented
    return _linear(func, x, weight.mT) if weight.base.dim() == 2 else _batched(x, weight)


def _bmm(func: Any, x: Any, weight: LowRankWeight) -> Any:
    return _batched(x, weight) if isinstance(x, Tensor) else NotImplemented


def _batched(x: Tensor, weight: LowRankWeight) -> Any:
    if not weight._fits(x):
        return NotImplemented
    base_out = torch.bmm(x, weight.base)
    return lora_batched_add(base_out, x, weight.left, weight.right, *weight.how.settings)


def _grouped(
    product: Any, x: Any, weight: LowRankWeight, offs: Tensor | None = None, **others: Any
) -> Any:
    if not isinstance(x, Tensor) or offs is None or x.dim() != 2 or weight.base.dim() != 3:
        return NotImplemented
    if any(value is not None for value in others.values()):  # a bias, another dtype
        return NotImplemented
    tensors = weight.base, weight.left, weight.right
    return lora_grouped(product, x, *tensors, offs, *weight.how.settings)


#: The functions that multiply with a weight, by name: `F.linear(x, w)`, `x @ w`, …
_PRODUCTS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _bmm,
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
}
