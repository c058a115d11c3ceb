"""Low-rank adapters on linears: the layer classes, and patching in place.

LoRA (Hu et al., 2021, arXiv:2106.09685) adds a trained branch of low rank to a frozen linear:

    y = W x + b + scale · B A x,    A: (dim, in_features),  B: (out_features, dim),  B = 0 at start

`LoRAMixin` is that branch over whatever linear comes next in the method resolution order, so the
base's own forward (quantised, fp8, a user's subclass) keeps doing the base's work, and the base's
parameters keep their names: the state dict gains `lora_a.weight` and `lora_b.weight` only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft._optional import HAVE_TE, TELinear
from bridge.peft.adapter_wrapper import AdapterWrapper, split_base_result
from bridge.peft.branch.adaptable import check_adaptable, te_constructor_arguments
from bridge.peft.branch.mixin import LoRAMixin, TransposedAdapter, add_branch
from bridge.peft.branch.options import BranchOptions, DropoutPosition, InitMethod
from bridge.peft.branch.orientation import is_transposed
from bridge.peft.errors import MissingExtraError, UnsupportedLinearError
from bridge.peft.ops import Path, lora_linear
from bridge.peft.shared_input import SharedInput


class LoRALinear(AdapterWrapper):
    """A wrapped linear plus an adapter module: for bases that answer with tuples (Megatron Core).

    Args:
        to_wrap: The base; its `forward` may return any of the forms that
            `AdapterWrapper.base_linear_forward` understands.
        adapter: Maps (..., in_features) to (..., out_features); its scale is its own affair.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the adapter's output to the base's.

        Args:
            x: (..., in_features).
            *args: Passed on to the base.
            **kwargs: Passed on to the base.

        Returns:
            `(linear_output + adapter_output, bias or None)`, or the bare sum where the base
            returns a bare tensor.
        """
        result = self.to_wrap(x, *args, **kwargs)
        if not self.adapter_enabled:
            return result
        linear_output, bias, adapter_input = split_base_result(result, x)
        output = linear_output + self.adapter(adapter_input).to(linear_output.dtype)
        return output if isinstance(result, Tensor) else (output, bias)


class LinearAdapter(LoRAMixin, nn.Linear):
    """Linear + LoRA; `weight` and `bias` keep their names in the checkpoint.

    Copies weight and bias of `orig_linear` into storage of its own and leaves `orig_linear` as it
    was; `patch_linear_module` is the way that copies nothing.

    Args:
        orig_linear: The plain `nn.Linear` to adapt, weight (out_features, in_features).
        dim: Rank of the update.
        alpha: Scaling numerator, `scale = alpha / dim`.
        dropout: Probability in [0, 1).
        dropout_position: `"pre"` (on x) or `"post"` (on the scaled branch output).
        lora_A_init_method: `"xavier"` or `"uniform"`.
        lora_dtype: Dtype of A and B; None takes the base weight's.

    Raises:
        UnsupportedLinearError: `orig_linear` is no plain `nn.Linear`.
        AlreadyAdaptedError: `orig_linear` is adapted already.
        ValueError: An option is out of range.
    """

    base_type = nn.Linear
    plain_forward = True
    #: What it shares an input with, if the recipe or `share_inputs` asked for it.
    shared_input: SharedInput | None = None

    def __init__(
        self,
        orig_linear: nn.Linear,
        dim: int = 8,
        alpha: float = 32,
        dropout: float = 0.0,
        dropout_position: DropoutPosition = "post",
        lora_A_init_method: InitMethod = "xavier",
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        check_adaptable(orig_linear)
        if type(orig_linear) is not nn.Linear:
            raise UnsupportedLinearError(
                f"LinearAdapter copies a plain nn.Linear, got {type(orig_linear).__name__}; "
                "patch_linear_module adapts it in place and keeps its own forward"
            )
        has_bias = orig_linear.bias is not None
        super().__init__(
            orig_linear.in_features, orig_linear.out_features, bias=has_bias, device="meta"
        )
        self.weight = nn.Parameter(orig_linear.weight.detach().clone())
        if has_bias:
            self.bias = nn.Parameter(orig_linear.bias.detach().clone())
        self.train(orig_linear.training)
        self._init_adapter(
            self, dim, alpha, dropout, dropout_position, lora_A_init_method, lora_dtype
        )

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`W x + b + scale · B A x`: (..., in_features) -> (..., out_features)."""
        if self.merged or not self.adapter_enabled or not self.has_plain_base():
            return super().forward(x)
        p = self.dropout_now()
        if self.shared_input is not None and not p and _is_training():
            result = self.shared_input.take(self, x)
            if result is not None:
                return result
        a, b = self.lora_a.weight, self.lora_b.weight
        return lora_linear(x, self.weight, self.bias, a, b, self.scale, p, self.dropout_position)

    def lora_path(self) -> Path:
        """Say which path computes this layer, and why."""
        path = super().lora_path()
        if self.shared_input is None or path.name != "fused" or self.dropout_now():
            return path
        partners = self.shared_input.partners(self)
        return Path.shared(partners) if partners else path


def _is_training() -> bool:
    """Whether a graph for backward is built, by autograd itself."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class TELinearAdapter(LoRAMixin, TELinear):
    """Transformer Engine linear + LoRA; `weight` and `bias` keep their names in the checkpoint.

    Copies `orig_linear` with its parallel and bias settings; `patch_linear_module` copies nothing.

    Args:
        orig_linear: The `transformer_engine.pytorch.Linear` to adapt.
        dim: Rank of the update.
        alpha: Scaling numerator, `scale = alpha / dim`.
        dropout: Probability in [0, 1).
        dropout_position: `"pre"` (on x) or `"post"` (on the scaled branch output).
        lora_A_init_method: `"xavier"` or `"uniform"`.
        lora_dtype: Dtype of A and B; None takes the base weight's.

    Raises:
        ImportError: Transformer Engine is not installed.
        UnsupportedLinearError: `orig_linear` is not exactly a `te.Linear`, has split parameters,
            is sharded over several ranks, or holds fp8 weights.
        AlreadyAdaptedError: `orig_linear` is adapted already.
        ValueError: An option is out of range.
    """

    base_type = TELinear
    _base_is_running = False

    def __init__(
        self,
        orig_linear: TELinear,
        dim: int = 8,
        alpha: float = 32,
        dropout: float = 0.0,
        dropout_position: DropoutPosition = "post",
        lora_A_init_method: InitMethod = "xavier",
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        if not HAVE_TE:
            raise MissingExtraError(
                "TELinearAdapter needs transformer_engine; pip install 'bridge-peft[te]' "
                "(needs a CUDA build of torch)"
            )
        check_adaptable(orig_linear)
        if type(orig_linear) is not TELinear:
            raise UnsupportedLinearError(
                f"TELinearAdapter copies a te.Linear, got {type(orig_linear).__name__}"
            )
        super().__init__(**te_constructor_arguments(orig_linear))
        with torch.no_grad():
            self.weight.copy_(orig_linear.weight)
            if self.use_bias:
                self.bias.copy_(orig_linear.bias)
        self.train(orig_linear.training)
        self._init_adapter(
            self, dim, alpha, dropout, dropout_position, lora_A_init_method, lora_dtype
        )

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._base_is_running = True
        try:
            return super()._base_forward(x, *args, **kwargs)
        finally:
            self._base_is_running = False

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Any:
        """As `nn.Module.named_parameters`, except to Transformer Engine's own forward.

        That forward compares the input's dtype with every parameter below the module, children
        included, and would refuse A and B in another dtype, which it never multiplies with.
        """
        recurse = recurse and not self._base_is_running
        return super().named_parameters(prefix, recurse, remove_duplicate)


def patch_linear_module(
    orig_linear: nn.Linear | TELinear,
    dim: int = 8,
    alpha: float = 32,
    dropout: float = 0.0,
    dropout_position: DropoutPosition = "post",
    lora_A_init_method: InitMethod = "xavier",
    lora_dtype: torch.dtype | None = None,
) -> nn.Linear | TELinear:
    """Adapt a linear in place; nothing of the base is copied or allocated, so `meta` is fine.

    Args:
        orig_linear: An `nn.Linear`, a subclass of it (4-bit, 8-bit, a user's), a `te.Linear`, or
            transformers' `Conv1D`.
        dim: Rank of the update.
        alpha: Scaling numerator, `scale = alpha / dim`.
        dropout: Probability in [0, 1).
        dropout_position: `"pre"` (on x) or `"post"` (on the scaled branch output).
        lora_A_init_method: `"xavier"` or `"uniform"`.
        lora_dtype: Dtype of A and B; None takes the base weight's, which must then be floating.

    Returns:
        The same object, its class now both an adapter class and its old class.

    Raises:
        UnsupportedLinearError: Not such a linear (`NotImplementedError` and `AssertionError`).
        AlreadyAdaptedError: Adapted or patched before (`AssertionError`); it is left as it was.
        ValueError: An option is out of range.

    Example:
        >>> layer = patch_linear_module(nn.Linear(64, 64), dim=4)
        >>> sorted(layer.state_dict())
        ['bias', 'lora_a.weight', 'lora_b.weight', 'weight']
    """
    options = BranchOptions(
        dim=dim,
        alpha=alpha,
        dropout=dropout,
        dropout_position=dropout_position,
        lora_A_init_method=lora_A_init_method,
        lora_dtype=lora_dtype,
    )
    patch_with_options(orig_linear, options)
    return orig_linear


def patch_with_options(
    module: nn.Module, options: BranchOptions, seed: int | None = None
) -> LoRAMixin:
    """As `patch_linear_module`, with options checked before and a seed for A.

    Args:
        module: The linear to adapt, in place.
        options: The branch's options.
        seed: Seed for A, or None for torch's default CPU generator.

    Returns:
        The same object.
    """
    check_adaptable(module)
    add_branch(module, options, seed)
    module.__class__ = adapted_class(type(module))
    assert isinstance(module, LoRAMixin)
    if "_hf_hook" in module.__dict__:
        # accelerate keeps the bound forward it stands before; it must be the adapted one.
        module.__dict__["_old_forward"] = type(module).forward.__get__(module)
    return module


@functools.cache
def adapted_class(base_type: type[nn.Module]) -> type[nn.Module]:
    """The adapter class over `base_type`: one per type, so that compiled graphs are shared.

    Args:
        base_type: The class of a linear before adaptation.

    Returns:
        `LinearAdapter` for `nn.Linear` itself, `TELinearAdapter` for `te.Linear`, else a class that
        derives from `base_type` and from `LinearAdapter`, or `TransposedAdapter` for a `Conv1D`.
    """
    if base_type is nn.Linear:
        return LinearAdapter
    if base_type is TELinear:
        return TELinearAdapter
    adapter = TransposedAdapter if is_transposed(base_type) else LinearAdapter
    plain = base_type.forward is nn.Linear.forward
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"{base_type.__name__} + LoRA; the base's forward is its own.",
        "__reduce_ex__": _reduce_by_base_type,
        "base_type": base_type,
        "plain_forward": plain,
    }
    if not plain:
        namespace["forward"] = LoRAMixin.forward
    return type(f"{base_type.__name__}Adapter", (adapter, base_type), namespace)


def _reduce_by_base_type(self: LoRAMixin, protocol: int) -> tuple[Any, ...]:
    # The class was made at run time and has no importable name; its base has.
    state = object.__reduce_ex__(self, 2)[2]
    return _new_adapted, (self.base_type,), state


def _new_adapted(base_type: type[nn.Module]) -> nn.Module:
    cls = adapted_class(base_type)
    return cls.__new__(cls)
