"""What a LoRA branch is made of: its options, checked once, and its two matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge.peft.branch.initializers import A_INITIALIZERS, initialize
from bridge.peft.errors import AdapterError

DropoutPosition = Literal["pre", "post"]
InitMethod = Literal["xavier", "uniform"]
#: The dtypes in which A and B can be trained.
TRAINABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dim(dim: object, name: str = "dim") -> None:
    """Raise `AdapterError` unless `dim` is an integer of at least 1."""
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise AdapterError(f"{name} must be an integer >= 1, got {dim!r}; usual values are 8 to 64")


def check_alpha(alpha: object, name: str = "alpha") -> None:
    """Raise `AdapterError` unless `alpha` is a finite number."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(
            f"{name} must be a finite number, got {alpha!r}; usual values are 16, 32"
        )


@dataclass(frozen=True, kw_only=True)
class BranchOptions:
    """The options of one branch `scale · B A x`.

    Attributes:
        dim: Rank of the update, at least 1.
        alpha: Scaling numerator; `scale = alpha / dim`, or `alpha / sqrt(dim)` with `use_rslora`.
        dropout: Probability in [0, 1) that an element of the branch is dropped in training.
        dropout_position: `"pre"` drops elements of the branch's input x, `"post"` elements of the
            scaled branch output.
        lora_A_init_method: `"xavier"` (`xavier_uniform_`) or `"uniform"`
            (`kaiming_uniform_(a=sqrt(5))`).
        lora_dtype: Dtype of A and B; None takes that of the base weight.
        use_rslora: Rank-stabilised scaling (Kalajdzievski, 2023, arXiv:2312.03732).

    Raises:
        AdapterError: A value is out of its range (a `ValueError`).
    """

    dim: int = 8
    alpha: float = 32
    dropout: float = 0.0
    dropout_position: DropoutPosition = "post"
    lora_A_init_method: InitMethod = "xavier"
    lora_dtype: torch.dtype | None = None
    use_rslora: bool = False

    def __post_init__(self) -> None:
        check_dim(self.dim)
        check_alpha(self.alpha)
        p = self.dropout
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
            raise AdapterError(f"dropout must be in [0, 1), got {p!r}; 0.0 turns it off")
        _check_choice("dropout_position", self.dropout_position, ("pre", "post"))
        _check_choice("lora_A_init_method", self.lora_A_init_method, tuple(A_INITIALIZERS))
        if self.lora_dtype is not None and self.lora_dtype not in TRAINABLE_DTYPES:
            raise AdapterError(
                f"lora_dtype must be a trainable floating dtype, got {self.lora_dtype!r}; "
                "pass torch.bfloat16, torch.float16, torch.float32 or torch.float64"
            )

    @property
    def scale(self) -> float:
        """The factor before B A x."""
        return self.alpha / (math.sqrt(self.dim) if self.use_rslora else self.dim)

    def resolve_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype of A and B over a base weight of `weight_dtype`.

        Raises:
            AdapterError: The base is quantised and no `lora_dtype` was given.
        """
        if self.lora_dtype is not None:
            return self.lora_dtype
        if weight_dtype not in TRAINABLE_DTYPES:
            name = str(weight_dtype).removeprefix("torch.")
            raise AdapterError(
                f"base weight is {name}, in which A and B cannot be trained; "
                "pass lora_dtype=torch.bfloat16"
            )
        return weight_dtype


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise AdapterError(f"{name} must be one of {listed}, got {value!r}")


class LoRAMatrix(nn.Module):
    """One of the two matrices of a branch, with the one method that may reset it.

    It is not an `nn.Linear`, so that code which sweeps over linears (weight initialisation,
    quantisation, target matching) leaves it alone; `B` stays zero until it is trained.

    Attributes:
        weight: (out_features, in_features), trainable.
        init_method: `"xavier"`, `"uniform"` or `"zeros"`.
        seed: Seed of the draw; None uses torch's default CPU generator.
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        init_method: str,
        *,
        seed: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.init_method = init_method
        self.seed = seed
        self.weight = nn.Parameter(
            torch.empty((out_features, in_features), device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values again (zero for B), in place."""
        initialize(self.weight, self.init_method, self.seed)

    def forward(self, x: Tensor) -> Tensor:
        """`x Wᵀ`: (..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to_empty` after `meta` would leave whatever the memory held before.
        was_meta = self.weight.device.type == "meta"
        super()._apply(fn, recurse)
        if was_meta:
            self.reset_parameters()
        return self

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.in_features}, {self.out_features}, init={self.init_method!r}"
