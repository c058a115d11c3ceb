"""The options of a branch, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from bridge.peft.branch.functions.starts import START_METHODS, is_start
from bridge.peft.branch.initializers import A_INITIALIZERS
from bridge.peft.dtypes import TRAINABLE_DTYPES, dtype_name
from bridge.peft.errors import AdapterError

DropoutPosition = Literal["pre", "post"]
InitMethod = Literal[
    "xavier", "uniform", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16"
]


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


def are_ranges(rows: object) -> bool:
    """Whether this is at least one (first, end), in ascending order and without overlap.

    Args:
        rows: Anything.
    """
    if not isinstance(rows, tuple | list) or not rows:
        return False
    last = 0
    for item in rows:
        if not isinstance(item, tuple | list) or [*map(type, item)] != [int, int]:
            return False
        if not last <= item[0] < item[1]:
            return False
        last = item[1]
    return True


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
            (`kaiming_uniform_(a=sqrt(5))`), with B = 0; or a start of A and B together, see
            `branch.functions.starts`: `"orthogonal"`, `"olora"`, `"pissa"`, `"pissa_niter_N"`.
        lora_dtype: Dtype of A and B; None takes that of the base weight.
        use_rslora: Rank-stabilised scaling (Kalajdzievski, 2023, arXiv:2312.03732).
        use_dora: `m / |W + scale · B A|` before the sum, by rows, with a trained m (Liu et al.,
            2024, arXiv:2402.09353).
        freeze_a: A stays as it was drawn, and only B trains (LoRA-FA, Zhang et al., 2023,
            arXiv:2308.03303): of the input nothing is kept for backward.
        rows: Which rows of B are trained, as (first, end) in ascending order; the others stay
            zero. None for all: parts of a fused projection are chosen so.

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
    use_dora: bool = False
    freeze_a: bool = False
    rows: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        check_dim(self.dim)
        check_alpha(self.alpha)
        p = self.dropout
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
            raise AdapterError(f"dropout must be in [0, 1), got {p!r}; 0.0 turns it off")
        starts = (*A_INITIALIZERS, *START_METHODS)
        choices = {"dropout_position": ("pre", "post"), "lora_A_init_method": starts}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known and not (
                known is starts and isinstance(value, str) and is_start(value)
            ):
                listed = ", ".join(map(repr, known))
                raise AdapterError(f"{name} must be one of {listed}, got {value!r}")
        if self.lora_dtype is not None and self.lora_dtype not in TRAINABLE_DTYPES:
            raise AdapterError(
                f"lora_dtype must be a trainable floating dtype, got {self.lora_dtype!r}; "
                "pass torch.bfloat16, torch.float16, torch.float32 or torch.float64"
            )

        if self.rows is not None and not are_ranges(self.rows):
            raise AdapterError(
                "rows must be (first, end) of rows of B in ascending order, without overlap, got "
                f"{self.rows!r:.80}"
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
            raise AdapterError(
                f"base weight is {dtype_name(weight_dtype)}, in which A and B cannot be trained; "
                "pass lora_dtype=torch.bfloat16"
            )
        return weight_dtype
