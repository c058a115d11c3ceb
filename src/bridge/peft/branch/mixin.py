"""The branch over whatever linear is next in the method resolution order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from bridge.peft.branch.functions.carried import carry
from bridge.peft.branch.functions.starts import is_start, is_subtracted, split
from bridge.peft.branch.matrix import GIVEN, Blocks, LoRAMatrix
from bridge.peft.branch.options import BranchOptions, DropoutPosition, InitMethod
from bridge.peft.branch.quantised.format import input_dtypes
from bridge.peft.branch.quantised.table import format_of
from bridge.peft.branch.state import KeepsState
from bridge.peft.branch.untouched import check_untouched, foreign_patch
from bridge.peft.errors import AdapterError, UnsupportedLinearError
from bridge.peft.ops.dispatch import ComputePath, choose_path, lora_add
from bridge.peft.ops.reference import add_in_base_dtype
from bridge.peft.parallel.fsdp import is_data_parallel
from bridge.peft.parallel.shard import Shard
from bridge.peft.parallel.tensor import add_sharded_branch
from bridge.peft.tensors import is_plain, is_sharded

#: What a branch starts from: a seed for A, the values of A and B (and of DoRA's magnitude), or
#: torch's default generator.
Start = int | tuple[Tensor, ...] | None


class LoRAMixin(KeepsState):
    """The branch over whatever linear is next in the method resolution order.

    A kind of base is a subclass in `branch/kinds/`: it says which classes it takes
    (`takes`, `refusal`), how wide they are (`features`) and which way round they store
    their weight (`oriented`); the rest of the library asks nothing else of it.

    Attributes:
        branch_options: The options that made the branch.
        dim: Rank of the update.
        alpha: Scaling numerator.
        scale: `alpha / dim` (or `alpha / sqrt(dim)`, rank-stabilised).
        dropout_position: `"pre"` or `"post"`.
        dropout: An `nn.Dropout`: its `p` and `training` are what the branch uses.
        lora_a: A, `weight` of shape (dim, in_features).
        lora_b: B, `weight` of shape (out_features, dim).
        adapter_enabled: False while the branch is switched off; see `disable_adapters`.
        merged: True while the branch is folded into the base weight; see `merge`.
        unmerged_weight: The base weight from before the merge, on the CPU, if it was kept; of a
            quantised layer all of its base (`branch.dense.SetAside`).
        on_call: Told of the next call of the layer, if anybody waits for it.
        bypassed: True if the model was run, and the layer's part of it, but never the layer.
    """

    branch_options: BranchOptions
    dim: int
    alpha: float
    scale: float
    dropout_position: DropoutPosition
    dropout: nn.Dropout
    lora_a: LoRAMatrix
    lora_b: LoRAMatrix
    adapter_enabled: bool
    merged: bool
    unmerged_weight: Any
    on_call: Callable[[LoRAMixin], None] | None = None
    bypassed: bool = False

    #: The class before adaptation; its forward does the base's work.
    base_type: ClassVar[type[nn.Module]]
    #: What the class's constructor copies, for messages.
    copies: ClassVar[str]
    #: True if the base's forward is `F.linear(x, weight, bias)` and nothing else.
    plain_forward: ClassVar[bool] = False
    #: True if the base stores its weight as (in_features, out_features).
    transposed: ClassVar[bool] = False
    #: Whether `"all-linear"` means modules of this kind.
    in_all_linear: ClassVar[bool] = True
    #: What follows a module's name in the keys of A and B in PEFT's files.
    peft_keys: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    #: True if the kind stands in its base's place and holds it, instead of patching it in place.
    wraps: ClassVar[bool] = False
    #: Whether a branch on this kind can be DoRA's, or start from the weight.
    takes_functions: ClassVar[bool] = False
    #: The name of the adapted parameter in `base`.
    weight_name: str = "weight"
    #: The name of the base's input, by which it may be passed too.
    input_name: ClassVar[str] = "input"

    @classmethod
    def takes(cls, base_type: type[nn.Module]) -> bool:
        """Whether this is the kind of a class of modules."""
        return issubclass(base_type, cls.base_type)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why a module of a class that this kind takes cannot be adapted; None if it can.

        Args:
            module: It is not adapted yet, and is not touched.
        """
        if taken := [name for name in BRANCH_ATTRIBUTES if hasattr(module, name)]:
            return f"its own attribute {taken[0]!r} would be overwritten by the adapter's"
        weight = cls.weight_of(module)
        if isinstance(weight, UninitializedParameter):
            return "its shape is not known yet; run one forward of the model first"
        if is_sharded(weight) and (reason := cls.sharded_refusal(module)):
            return reason
        if weight.device.type == "meta" and "_hf_hook" in vars(module):
            return "its weight is offloaded; load the model without disk or CPU offload"
        return foreign_patch(module) or _layout_reason(cls, type(module))

    @classmethod
    def sharded_refusal(cls, module: nn.Module) -> str | None:
        """Why a module whose weight is a DTensor cannot be adapted; None if it can.

        Args:
            module: It is not adapted yet, and is not touched.
        """
        if is_data_parallel(module):
            return None
        return "its weight is sharded (DTensor); adapt the model before sharding it"

    @classmethod
    def check_copyable(cls, module: nn.Module) -> None:
        """Raise unless `module` is of exactly the base type and can be copied; touches nothing."""
        check_untouched(module)
        if type(module) is not cls.base_type:
            raise UnsupportedLinearError(
                f"{cls.__name__} copies {cls.copies}, got {type(module).__name__}; "
                "patch_linear_module adapts other linears in place and keeps their own forward"
            )
        if is_sharded(getattr(module, "weight", None)):
            raise UnsupportedLinearError(
                f"cannot copy this {type(module).__name__}: its weight is sharded, which a "
                "copy's would not be; LoRA(...)(model) adapts it in place"
            )
        if reason := cls.refusal(module):
            raise UnsupportedLinearError(f"cannot copy this {type(module).__name__}: {reason}")

    @classmethod
    def init_methods(cls, options: BranchOptions) -> tuple[str, str]:
        """How A and B start; one of the two is zero, unless both come out of the weight."""
        if is_start(options.lora_A_init_method):
            return GIVEN, GIVEN
        return options.lora_A_init_method, "zeros"

    @classmethod
    def blocks_of_b(cls, module: nn.Module, options: BranchOptions) -> Blocks | None:
        """What of B is not zero; None where all of it is trained."""
        if options.rows is None:
            return None
        return tuple((start, stop, 0, options.dim) for start, stop in options.rows)

    @classmethod
    def features(cls, module: nn.Module) -> tuple[int, int]:
        """`(in_features, out_features)` of a module that this kind takes."""
        return module.in_features, module.out_features  # pyright: ignore[reportReturnType]

    @classmethod
    def weight_of(cls, module: nn.Module) -> Tensor:
        """The tensor of a module that says where A and B lie and in which dtype: its weight."""
        return module.weight  # pyright: ignore[reportReturnType]

    @classmethod
    def wrap(
        cls, module: nn.Module, options: BranchOptions, start: Start = None, name: str = ""
    ) -> LoRAMixin:
        """The adapted module that stands in the place of `module`, of a kind that wraps.

        Args:
            module: The base; it is frozen.
            options: The branch's options.
            start: What the branch starts from.
            name: The module's fully qualified name.
        """
        raise NotImplementedError(cls.__name__)

    @property
    def base(self) -> nn.Module:
        """The module that holds the base's parameters: this one, unless it wraps another."""
        return self

    @classmethod
    def weight_shard(cls, module: nn.Module) -> Shard | None:
        """Which part of the whole weight a module holds by its class's own sharding; None: all."""
        return None

    def let_go(self) -> nn.Module:
        """Make the base what it was before, and return it; whether it wants gradients aside."""
        return self.base

    def forward(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run the base's own forward and add the branch to its result.

        Args:
            x: (..., in_features); by the base's own name for it too.
            *args: Passed on to the base.
            **kwargs: Passed on to the base.

        Returns:
            What the base returns, its (first) tensor of shape (..., out_features) with the branch.
        """
        if x is None:
            x = self.given(kwargs.pop(self.input_name, None))
        self.note_call()
        result = self._base_forward(x, *args, **kwargs)
        if not self.is_active():
            return result
        if isinstance(result, tuple):
            return (self._add_branch(result[0], x), *result[1:])
        return self._add_branch(result, x)

    def is_active(self) -> bool:
        """Whether the branch is computed: neither merged nor switched off."""
        return self.adapter_enabled and not self.merged

    def note_call(self) -> None:
        """Tell who waits for it that the layer is called; a compiled graph tells nobody."""
        if self.on_call is not None and not torch.compiler.is_compiling():
            self.on_call(self)

    @classmethod
    def given(cls, x: Tensor | None) -> Tensor:
        """The input, passed by its name.

        Args:
            x: What was passed.

        Raises:
            TypeError: Nothing was, as for a linear.
        """
        if x is None:
            raise TypeError(f"forward() misses its input ({cls.input_name!r})")
        return x

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _add_branch(self, base_out: Tensor, x: Tensor) -> Tensor:
        if self.has_hooks_on_a_or_b():
            return self._add_branch_by_calls(base_out, x)
        a, b = self.factors()
        add = add_sharded_branch if is_sharded(a) else lora_add
        drop = self.dropout_now(), self.dropout_position
        return self.finished(add(base_out, x, a, b, self.scale, *drop), a, b)  # pyright: ignore

    def has_hooks_on_a_or_b(self) -> bool:
        """Whether something waits for calls of A or B: offloading, parameters gathered late."""
        return _has_hooks(self.lora_a) or _has_hooks(self.lora_b)

    def _add_branch_by_calls(self, base_out: Tensor, x: Tensor) -> Tensor:
        """The plain formula by calls of A and B, so that hooks on them can bring their weights."""
        dtype, pre = self.branch_dtype, self.dropout_position == "pre"
        x = x.to(dtype)
        x = self.dropout(x) if pre else x
        branch = self.less_start(self.lora_b(self.lora_a(x) * self.scale), x)
        out = add_in_base_dtype(base_out, branch if pre else self.dropout(branch))
        return out if self.magnitude is None else self.finished(out, *self.called_a_and_b())

    @property
    def branch_dtype(self) -> torch.dtype:
        """The dtype of A and B."""
        return self.lora_a.weight.dtype

    def dropout_now(self) -> float:
        """The probability in force: that of the `nn.Dropout`, 0 in evaluation."""
        return self.dropout.p if self.dropout.training else 0.0

    def lora_path(self) -> ComputePath:
        """Say which path computes this layer, and why."""
        trains = self.lora_b.weight.requires_grad
        tensors = (self.base_weight, self.lora_a.weight, self.lora_b.weight)
        # what is sharded is computed on this rank's plain tensors
        weight, a, b = (t.to_local() if is_sharded(t) else t for t in tensors)  # pyright: ignore
        plain = self.plain_forward and is_plain(weight)
        known = (weight, a, b) if plain else (a, b)
        return choose_path(*known, plain_linear=plain, trains_b=trains)

    def has_plain_base(self) -> bool:
        """Whether the base computes `F.linear` on plain tensors, not on a tensor subclass."""
        return self.plain_forward and is_plain(self.base_weight)

    def sample_input(self, rows: int) -> Tensor:
        """A random input of a few rows, in the dtype that the base takes; A's if W is packed."""
        weight = self.base_weight
        dtype = input_dtypes(self)[0] if format_of(self) is not None else weight.dtype
        return torch.randn(rows, self.input_width).to(weight.device, dtype)

    def is_zero(self) -> bool:
        """Whether the branch is zero, as at the start."""
        return not (bool(self.lora_a.weight.any()) and bool(self.lora_b.weight.any()))

    def is_linear(self) -> bool:
        """Whether the base computes `W x + b`, so that merging into W keeps the function."""
        return True

    def oriented(self, weight: Tensor) -> Tensor:
        """`weight` as (out_features, in_features), or back, where the base stores it transposed."""
        return weight.t() if self.transposed else weight

    @property
    def input_width(self) -> int:
        """Features of x as this process sees it."""
        return self.features(self)[0]

    @property
    def is_sharded(self) -> bool:
        """Whether this process may hold a part of A or B only, so that saving is a collective."""
        return any(map(is_sharded, self.adapter_parameters().values()))

    @property
    def base_weight(self) -> Tensor:
        """The base's own weight, the way round that the base stores it."""
        own = self._parameters.get("weight")
        return self.weight if own is None else own  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        lora = f"dim={self.dim}, alpha={self.alpha}, scale={self.scale:g}"
        return f"{super().extra_repr()}, {lora}, dropout_position={self.dropout_position!r}"

    @classmethod
    def attach_branch(cls, module: nn.Module, options: BranchOptions, start: Start = None) -> None:
        """Freeze a module of this kind and give it A, B and their settings, in place.

        Its class stays; `branch.patch` changes that.
        """
        weight = cls.weight_of(module)
        placed: dict[str, Any] = {
            "device": weight.device,
            "dtype": options.resolve_dtype(weight.dtype),
        }
        seed, values = (None, start) if isinstance(start, tuple) else (start, (None, None))
        a, b, *magnitude = values
        start = None
        if a is not None and b is not None and is_subtracted(options.lora_A_init_method):
            (a, b), start = split(a, b)
        n_in, n_out = cls.features(module)
        a_method, b_method = cls.init_methods(options)
        lora_a = LoRAMatrix(n_in, options.dim, a_method, seed=seed, values=a, **placed)
        blocks = cls.blocks_of_b(module, options)
        placed_b: dict[str, Any] = {"seed": seed, "values": b, "blocks": blocks, **placed}
        lora_b = LoRAMatrix(options.dim, n_out, b_method, **placed_b)
        module.requires_grad_(False)
        for name, value in branch_settings(options).items():
            setattr(module, name, value)
        module.dropout, module.lora_a, module.lora_b = nn.Dropout(options.dropout), lora_a, lora_b
        for child in (module.dropout, lora_a, lora_b):
            child.train(module.training)
        lora_a.requires_grad_(not options.freeze_a)
        carry(module, start, n_out if options.use_dora else 0, *magnitude, **placed)

    @staticmethod
    def _init_adapter(
        obj: nn.Module,
        dim: int = 8,
        alpha: float = 32,
        dropout: float = 0.0,
        dropout_position: DropoutPosition = "post",
        lora_A_init_method: InitMethod = "xavier",
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        """Freeze `obj`, a linear, and give it A, B and their settings, in place."""
        options = BranchOptions(
            dim=dim,
            alpha=alpha,
            dropout=dropout,
            dropout_position=dropout_position,
            lora_A_init_method=lora_A_init_method,
            lora_dtype=lora_dtype,
        )
        if is_start(lora_A_init_method) and not isinstance(obj, LoRAMixin):
            raise AdapterError(
                f"lora_A_init_method={lora_A_init_method!r} is taken out of the base's weight; "
                "patch_linear_module does that"
            )
        LoRAMixin.attach_branch(obj, options)
        if isinstance(obj, LoRAMixin) and is_start(lora_A_init_method):
            obj.set_start(None)


@functools.cache
def _layout_reason(kind: type[nn.Module], base_type: type[nn.Module]) -> str | None:
    """Why objects of a class cannot become an adapter's; None if they can."""
    try:
        blank = object.__new__(base_type)
        blank.__class__ = type("Adapter", (kind, base_type), {})  # pyright: ignore
    except TypeError:
        if issubclass(kind, base_type):
            return None
        return (
            "its class has a layout in memory of its own (a base class that is no nn.Module); wrap "
            "it in LoRALinear"
        )
    return None


def _has_hooks(matrix: LoRAMatrix) -> bool:
    return bool(matrix._forward_pre_hooks or matrix._forward_hooks or "forward" in vars(matrix))


def branch_settings(options: BranchOptions) -> dict[str, Any]:
    """What a branch sets on its module beside its children."""
    return {
        "branch_options": options,
        "dim": options.dim,
        "alpha": options.alpha,
        "scale": options.scale,
        "dropout_position": options.dropout_position,
        "adapter_enabled": True,
        "merged": False,
        "unmerged_weight": None,
    }


#: What a branch adds to a module, which must be free before.
BRANCH_ATTRIBUTES = (
    *branch_settings(BranchOptions()),
    *("dropout", "lora_a", "lora_b", "lora_start", "lora_magnitude"),
)
