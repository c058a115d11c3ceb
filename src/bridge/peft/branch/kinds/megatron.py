"""Megatron Core's column and row parallel linears, wrapped, with A and B split as W is."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft._optional import megatron_core
from bridge.peft.branch.matrix import ShardedMatrix
from bridge.peft.branch.mixin import LoRAMixin, Start
from bridge.peft.branch.options import BranchOptions
from bridge.peft.branch.untouched import foreign_patch
from bridge.peft.branch.wrapper import LoRALinear, split_base_result
from bridge.peft.errors import AdapterError
from bridge.peft.ops.dispatch import ComputePath
from bridge.peft.parallel.agreement import check_alike
from bridge.peft.parallel.exchange import exchanged_lora_add
from bridge.peft.parallel.megatron import LinearLayout, refusal_of, takes
from bridge.peft.parallel.shard import Shard

_SEED_ALIKE = "call torch.manual_seed with one seed on all tensor parallel ranks"


class MegatronLoRA(nn.Module):
    """The adapter for one of Megatron's parallel linears: `scale · B A x`, split as the base is.

    Attributes:
        branch_options: The options that made it.
        layout: How the base lies on the ranks.
        linear_in: A, this rank's part.
        linear_out: B, this rank's part.

    Args:
        base: The linear; it is not touched.
        options: The branch's options.
        start: A seed for A, whole A and B, or None for torch's default CPU generator, which must
            be alike on all tensor parallel ranks.
        name: The base's name in the model, by which a gated `linear_fc1` is known.

    Raises:
        AdapterError: The ranks were given different options, shapes or seeds.
    """

    def __init__(
        self, base: nn.Module, options: BranchOptions, start: Start = None, name: str = ""
    ) -> None:
        super().__init__()
        weight: Tensor = base.weight  # pyright: ignore[reportAssignmentType]
        self.branch_options, self.layout = options, LinearLayout.of(base, name)
        n_out, n_in = self.layout.weight.shape(weight.shape)
        seed, (a, b) = (None, start) if isinstance(start, tuple) else (start, (None, None))
        what, fix = f"the adapter of {name or type(base).__name__}", "pass LoRA(seed=…)"
        check_alike((n_in, n_out, options, seed), what, fix, self.layout.group)
        placed: dict[str, Any] = {"like": weight, "dtype": options.resolve_dtype(weight.dtype)}
        method, dim = options.lora_A_init_method, options.dim
        self.dropout = nn.Dropout(options.dropout)
        self.linear_in = ShardedMatrix(
            n_in, dim, method, self.layout.a, seed=seed, values=a, **placed
        )
        self.linear_in.requires_grad_(not options.freeze_a)
        self.linear_out = ShardedMatrix(dim, n_out, "zeros", self.layout.b, values=b, **placed)
        self._generators_are_alike = False

    def forward(self, x: Tensor) -> Tensor:
        """The branch alone.

        Args:
            x: This rank's input, (tokens, …, in_features of this rank).

        Returns:
            As the base returns it: (tokens, …, out_features of this rank).
        """
        exchange = self.layout.exchange
        more = {"gather": exchange.size}.get(exchange.h, 1)
        fewer = {"scatter": exchange.size}.get(exchange.h, 1)
        shape = (x.shape[0] * more // fewer, *x.shape[1:-1], self.linear_out.out_features)
        return self.added_to(x.new_zeros(shape, dtype=self.linear_out.weight.dtype), x)

    def added_to(self, base_out: Tensor, x: Tensor) -> Tensor:
        """`base_out + scale · B A x`.

        Args:
            base_out: This rank's result of the base; only read.
            x: What the base multiplied, this rank's.
        """
        options, exchange = self.branch_options, self.layout.exchange
        dropout = self.dropout.p if self.dropout.training else 0.0
        if dropout and not self._generators_are_alike:
            state = hashlib.sha256(bytes(torch.get_rng_state().tolist())).hexdigest()
            check_alike(state, "torch's default generator", _SEED_ALIKE, exchange.group)
            self._generators_are_alike = True
        a, b = self.linear_in.weight, self.linear_out.weight
        position = options.dropout_position
        return exchanged_lora_add(base_out, x, a, b, options.scale, exchange, dropout, position)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A and B as Megatron's `ShardedTensor`s, as any number of ranks can load them."""
        utils = megatron_core("transformer.utils")
        known: dict[str, Any] = utils.ensure_metadata_has_dp_cp_group(metadata)
        matrices = {"linear_in.weight": self.linear_in, "linear_out.weight": self.linear_out}
        sharded = utils.make_sharded_tensors_for_checkpoint(
            {name: matrix.weight for name, matrix in matrices.items()},
            prefix,
            {n: m.shard.dim for n, m in matrices.items() if m.shard.dim is not None},
            sharded_offsets,
            tp_group=self.layout.group,
            dp_cp_group=known["dp_cp_group"],
        )
        if self.layout.blocks == 2:  # as Megatron's MLP does with the rows of W
            gated, key = megatron_core("transformer.mlp"), f"{prefix}linear_out.weight"
            apart = known.get("singleton_local_shards", False)
            sharded[key] = gated.apply_swiglu_sharded_factory(sharded[key], sharded_offsets, apart)
        return sharded


def _of_adapter(name: str) -> Any:
    return property(lambda self: getattr(self.adapter, name))


def _of_options(name: str) -> Any:
    return property(lambda self: getattr(self.adapter.branch_options, name))


class MegatronLinearAdapter(LoRALinear, LoRAMixin):
    """A parallel linear of Megatron Core in its wrapper, beside a `MegatronLoRA`.

    Answers with `(output, bias or None)` as the base does; a base fused with its layer norm is
    asked for the norm's output, which feeds the branch and is not passed on. What the model asks of
    its linear beside calling it, the base answers.

    Args:
        to_wrap: The linear; it is frozen.
        adapter: Its adapter.
    """

    wraps = True
    input_name = "input_"
    branch_options = _of_adapter("branch_options")
    dropout = _of_adapter("dropout")
    lora_a = _of_adapter("linear_in")
    lora_b = _of_adapter("linear_out")
    dim = _of_options("dim")
    alpha = _of_options("alpha")
    scale = _of_options("scale")
    dropout_position = _of_options("dropout_position")

    to_wrap: nn.Module
    adapter: MegatronLoRA

    def __init__(self, to_wrap: nn.Module, adapter: MegatronLoRA) -> None:
        super().__init__(to_wrap, adapter)
        to_wrap.requires_grad_(False)
        self.merged = False
        self.unmerged_weight = None
        self._asked_for_norm = getattr(to_wrap, "return_layernorm_output", None)
        if self._asked_for_norm is not None:
            to_wrap.return_layernorm_output = True  # pyright: ignore[reportArgumentType]
        adapter.train(to_wrap.training)
        self.training = to_wrap.training
        self.register_load_state_dict_post_hook(lambda self, _: self._follow_base_off_meta())

    @classmethod
    def takes(cls, base_type: type[nn.Module]) -> bool:
        """Whether Megatron calls it a parallel linear or grouped experts, or it is adapted."""
        return issubclass(base_type, cls) or takes(base_type)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why this module cannot be wrapped; None if it can."""
        return refusal_of(module) or foreign_patch(module)

    @classmethod
    def features(cls, module: nn.Module) -> tuple[int, int]:
        """`(in_features, out_features)` of the whole linear, whatever part of it is here."""
        linear = module.to_wrap if isinstance(module, cls) else module
        weight: Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
        n_out, n_in = LinearLayout.of(linear).weight.shape(weight.shape)
        return n_in, n_out

    @classmethod
    def wrap(
        cls, module: nn.Module, options: BranchOptions, start: Start = None, name: str = ""
    ) -> LoRAMixin:
        """The wrapper that stands in the place of `module`; the base is frozen."""
        return cls(module, MegatronLoRA(module, options, start, name))

    @property
    def base(self) -> nn.Module:
        """The wrapped linear."""
        return self.to_wrap

    def let_go(self) -> nn.Module:
        """Make the base answer as it did before, and return it."""
        if self._asked_for_norm is not None:
            self.to_wrap.return_layernorm_output = self._asked_for_norm
        return self.to_wrap

    @property
    def base_weight(self) -> Tensor:
        """This rank's part of the base's weight."""
        return self.to_wrap.weight  # pyright: ignore[reportReturnType]

    @property
    def input_width(self) -> int:
        """Columns of this rank's part of the weight."""
        return self.base_weight.shape[1]

    @property
    def is_sharded(self) -> bool:
        """Whether the weight is split over several ranks."""
        return self.adapter.layout.size > 1

    @classmethod
    def weight_shard(cls, module: nn.Module) -> Shard | None:
        """Which part of the weight this rank holds, adapted or not."""
        if isinstance(module, cls):
            return module.adapter.layout.weight
        return LinearLayout.of(module).weight

    def forward(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run the base and add the branch to its output.

        Args:
            x: This rank's input, (tokens, batch, in_features of this rank).
            *args: Passed on to the base.
            **kwargs: Passed on to the base.

        Returns:
            `(output, bias or None)`.
        """
        if x is None:
            x = self.given(kwargs.pop(self.input_name, None))
        self.note_call()
        out, bias, fed = split_base_result(self.to_wrap(x, *args, **kwargs), x)
        if self.merged or not self.adapter_enabled:
            return out, bias
        if out.shape[-1] != self.base_weight.shape[0]:
            raise AdapterError(
                "the base's output was gathered over the tensor parallel ranks, and the branch's "
                "is not; run the model with parallel_output=True, or leave this linear out"
            )
        return self.adapter.added_to(out, fed), bias

    def lora_path(self) -> ComputePath:
        """Say which path computes this layer, and why."""
        if self.is_sharded:
            return ComputePath("branch", "the base's own forward, then the branch on this rank")
        return super().lora_path()

    def whole_parameters(self) -> dict[str, Tensor]:
        """A and B, whole and detached; a collective, so every rank must call."""
        names = ("adapter.linear_in.weight", "adapter.linear_out.weight")
        return dict(zip(names, (self.lora_a.whole(), self.lora_b.whole()), strict=True))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the wrapper's; while merged without A and B, which the weight then holds."""
        state = super().state_dict(*args, **kwargs)
        if self.merged:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            for name in self.adapter_parameters():
                state.pop(prefix + name, None)
        return state

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As the wrapper's; while merged without A and B, likewise."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.merged:
            for name in self.adapter_parameters():
                sharded.pop(prefix + name)
        return sharded

    def __getattr__(self, name: str) -> Any:
        # what Megatron asks of a linear beside calling it: `weight`, `backward_dw()`, …
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("to_wrap", "adapter"):  # not there yet
                raise
            return getattr(self.to_wrap, name)
