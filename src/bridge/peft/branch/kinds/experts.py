"""Parameters that a module multiplies with itself: the experts' weights in one stack, a router's.

transformers keeps the experts of a layer in two parameters, `gate_up_proj` and `down_proj`, each
(experts, ·, ·), and takes them into products of its own: expert by expert, batched or grouped. A
branch on such a parameter is a child of the module, and the module's forward reads the parameter
as `W + s · B A` without that sum ever being formed (`ops/low_rank_weight.py`).

    experts.gate_up_proj                      W, (experts, out, in), under its own name
    experts.gate_up_proj_lora.lora_a.weight   A, (experts, dim, in)
    experts.gate_up_proj_lora.lora_b.weight   B, (experts, out, dim)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from bridge.peft.branch.matrix import LoRAMatrix
from bridge.peft.branch.mixin import LoRAMixin, Start, branch_settings
from bridge.peft.branch.options import BranchOptions
from bridge.peft.branch.untouched import foreign_patch
from bridge.peft.dtypes import TRAINABLE_DTYPES, dtype_name
from bridge.peft.errors import AdapterError
from bridge.peft.ops.dispatch import ComputePath
from bridge.peft.ops.low_rank_weight import How, LowRankWeight
from bridge.peft.parallel.fsdp import is_data_parallel
from bridge.peft.tensors import is_plain, is_sharded

#: Behind a parameter's name, the name of its branch.
SUFFIX = "_lora"
#: The matrix of q, k and v in torch's attention.
IN_PROJECTION = "in_proj_weight"
#: How such a parameter is computed.
PARAMETER_PATH = ComputePath(
    "experts", "its module's own products, with the branch's thin ones beside them"
)


def is_turned(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter is (…, in_features, out_features), as its module and PEFT see it.

    Args:
        module: Experts of transformers say so themselves (`is_transposed`).
        parameter: One of the module's.
    """
    return parameter.dim() == 3 and getattr(module, "is_transposed", False) is True


def parameter_features(module: nn.Module, name: str) -> tuple[int, int]:
    """`(in_features, out_features)` of each matrix in a parameter.

    Args:
        module: The module that holds it.
        name: The parameter's name there.
    """
    parameter = module._parameters[name]
    assert parameter is not None
    rows, columns = parameter.shape[-2:]
    return (rows, columns) if is_turned(module, parameter) else (columns, rows)


def experts_per_token(module: nn.Module) -> int:
    """How many experts a token takes, by the config that transformers' experts hold; 1 if unknown.

    Args:
        module: The module that holds a stack.
    """
    config = getattr(module, "config", None)
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")
    counts = (getattr(config, name, None) for name in names)
    return next((count for count in counts if isinstance(count, int)), 1)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is torch's `nn.MultiheadAttention`, with the forward that torch gave it.

    Args:
        module: Any module, adapted or not.
    """
    cls = getattr(module, "base_type", type(module))
    return isinstance(module, nn.MultiheadAttention) and (
        cls.forward is nn.MultiheadAttention.forward
    )


def parameter_refusal(module: nn.Module, name: str) -> str | None:
    """Why a parameter cannot carry a branch; None if it can.

    Args:
        module: The module that holds it, not adapted.
        name: The parameter's name there.
    """
    parameter = module._parameters[name]
    if isinstance(parameter, UninitializedParameter):
        return "its shape is not known yet; run one forward of the model first"
    if parameter is None or parameter.dim() not in (2, 3):
        return "it is neither a matrix nor a stack of matrices"
    if isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag | _ConvNd):
        return f"it belongs to a {type(module).__name__}, which target_modules names"
    reads = name == IN_PROJECTION and is_attention(module)
    opaque = isinstance(module, nn.MultiheadAttention | nn.RNNBase | torch.jit.ScriptModule)
    if opaque and not reads:
        return f"a {type(module).__name__} computes with it past its name"
    if is_sharded(parameter) and not is_data_parallel(module, name):
        return "it is sharded by more than FSDP2 (DTensor); adapt the model before sharding it"
    is_known = is_plain(parameter) or is_sharded(parameter)
    if parameter.dtype not in TRAINABLE_DTYPES or not is_known:
        kind = dtype_name(parameter.dtype) if is_plain(parameter) else type(parameter).__name__
        return f"it is quantised ({kind})"
    if parameter.is_meta and "_hf_hook" in vars(module):
        return "it is offloaded; load the model without disk or CPU offload"
    if hasattr(module, f"{name}{SUFFIX}"):
        return f"the module's own attribute {name + SUFFIX!r} would be overwritten"
    return foreign_patch(module)


class ParameterBranch(LoRAMixin):
    """A branch on a parameter: A and B of each of its matrices, and how it reads with them.

    Its `base` is the module that has the parameter, `weight_name` the parameter's name there.
    """

    base_type = nn.Module
    copies = "nothing"

    def __init__(
        self, holder: nn.Module, name: str, options: BranchOptions, start: Start = None
    ) -> None:
        super().__init__()
        # in a tuple, since the holder is no child of its own child
        self._held_by = (holder,)
        self.weight_name = name
        base = self.base_weight
        self.transposed = is_turned(holder, base)  # pyright: ignore[reportAttributeAccessIssue]
        self._attach(options, start, tuple(base.shape[:-2]), base)
        base.requires_grad_(False)
        self.train(holder.training)

    def _attach(
        self, options: BranchOptions, start: Start, stack: tuple[int, ...], base: Tensor
    ) -> None:
        placed: dict[str, Any] = {
            "device": base.device,
            "dtype": options.resolve_dtype(base.dtype),
            "stack": stack,
        }
        seed, (a, b) = (None, start) if isinstance(start, tuple) else (start, (None, None))
        n_in, n_out = parameter_features(self.base, self.weight_name)
        method = options.lora_A_init_method
        for name, value in branch_settings(options).items():
            setattr(self, name, value)
        self.dropout = nn.Dropout(options.dropout)
        self.lora_a = LoRAMatrix(n_in, options.dim, method, seed=seed, values=a, **placed)
        self.lora_b = LoRAMatrix(options.dim, n_out, "zeros", values=b, **placed)
        self.lora_a.requires_grad_(not options.freeze_a)

    @classmethod
    def takes(cls, base_type: type[nn.Module]) -> bool:
        """No class of modules: the recipe chooses parameters by name."""
        return False

    @classmethod
    def features(cls, module: nn.Module) -> tuple[int, int]:
        """`(in_features, out_features)` of each matrix."""
        assert isinstance(module, ParameterBranch)
        return parameter_features(module.base, module.weight_name)

    @property
    def base(self) -> nn.Module:
        """The module that has the parameter."""
        return self._held_by[0]

    @property
    def base_weight(self) -> Tensor:
        """The parameter: (experts, rows, columns), or one matrix."""
        parameter = self.base._parameters[self.weight_name]
        assert parameter is not None
        return parameter

    def oriented(self, weight: Tensor) -> Tensor:
        """Each matrix as (out_features, in_features), or back."""
        return weight.mT if self.transposed else weight

    def lora_path(self) -> ComputePath:
        """That the module's own code computes with it."""
        return PARAMETER_PATH

    def has_plain_base(self) -> bool:
        """No: what the base computes is its module's affair."""
        return False

    def read(self) -> LowRankWeight:
        """The parameter as its module's forward reads it: W with the branch, not added up.

        Raises:
            AdapterError: A and B are offloaded, so there are no values to compute with.
        """
        self.note_call()
        self.check_not_offloaded()
        base, a, b = self.base_weight, self.lora_a.weight, self.lora_b.weight
        name = f"{type(self.base).__name__}.{self.weight_name}"
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        how = How(name, self.scale, self.dropout_now(), self.dropout_position)
        return LowRankWeight(base, left, right, how)

    def check_not_offloaded(self) -> None:
        """Raise `AdapterError` if the base is there and A and B are not."""
        if self.lora_a.weight.is_meta and not self.base_weight.is_meta:
            raise AdapterError(
                f"A of {type(self.base).__name__}.{self.weight_name} is offloaded; keep the "
                "adapter on the device (dispatch the model before adapting it)"
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`x Wᵀ + s · x Aᵀ Bᵀ`, matrix by matrix: for checks, since the module never calls it.

        Args:
            x: (tokens, in_features), which each matrix of a stack gets.
            *args: None.
            **kwargs: None.

        Returns:
            (tokens, out_features), with (experts, …) before it for a stack.
        """
        weight = self.read() if self.is_active() else self.base_weight
        weight = weight if self.transposed else weight.mT
        if self.base_weight.dim() == 2:
            return torch.matmul(x, weight)  # pyright: ignore[reportArgumentType]
        return torch.bmm(x.expand(len(self.base_weight), *x.shape), weight)  # pyright: ignore

    def _follow_base_off_meta(self) -> None:
        """Materialise A and B when loading with `assign=True` has materialised the base."""
        base = self.base_weight
        for matrix in (self.lora_a, self.lora_b):
            if matrix.weight.is_meta and not base.is_meta:
                matrix.to_empty(device=base.device)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.weight_name}, {super().extra_repr().removeprefix(', ')}"
