"""The LoRA branch over whatever linear is next in the method resolution order."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bridge.peft.branch.options import BranchOptions, DropoutPosition, InitMethod, LoRAMatrix
from bridge.peft.branch.orientation import features
from bridge.peft.ops import Path, choose_path, lora_add

_LORA_KEYS = ("lora_a.weight", "lora_b.weight")


class LoRAMixin(nn.Module):
    """The LoRA branch over whatever linear is next in the method resolution order.

    Attributes:
        dim: Rank of the update.
        alpha: Scaling numerator.
        scale: `alpha / dim` (or `alpha / sqrt(dim)`, rank-stabilised).
        dropout_position: `"pre"` or `"post"`.
        dropout: An `nn.Dropout`: its `p` and `training` are what the branch uses.
        lora_a: A, `weight` of shape (dim, in_features).
        lora_b: B, `weight` of shape (out_features, dim).
        adapter_enabled: False while the branch is switched off; see `disable_adapters`.
        merged: True while the branch is folded into the base weight; see `merge`.
        unmerged_weight: The base weight from before the merge, on the CPU, if it was kept.
    """

    dim: int
    alpha: float
    scale: float
    dropout_position: DropoutPosition
    dropout: nn.Dropout
    lora_a: LoRAMatrix
    lora_b: LoRAMatrix
    adapter_enabled: bool
    merged: bool
    unmerged_weight: Tensor | None
    in_features: int
    out_features: int

    #: The class before adaptation; its forward does the base's work.
    base_type: ClassVar[type[nn.Module]]
    #: True if the base's forward is `F.linear(x, weight, bias)` and nothing else.
    plain_forward: ClassVar[bool] = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the base's own forward and add the branch to its result.

        Args:
            x: (..., in_features).
            *args: Passed on to the base.
            **kwargs: Passed on to the base.

        Returns:
            What the base returns, its (first) tensor of shape (..., out_features) with the branch.
        """
        result = self._base_forward(x, *args, **kwargs)
        if self.merged or not self.adapter_enabled:
            return result
        if isinstance(result, tuple):
            return (self._add_branch(result[0], x), *result[1:])
        return self._add_branch(result, x)

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _add_branch(self, base_out: Tensor, x: Tensor) -> Tensor:
        a, b = self.lora_a.weight, self.lora_b.weight
        return lora_add(base_out, x, a, b, self.scale, self.dropout_now(), self.dropout_position)

    def dropout_now(self) -> float:
        """The probability in force: that of the `nn.Dropout`, 0 in evaluation."""
        return self.dropout.p if self.dropout.training else 0.0

    def lora_path(self) -> Path:
        """Say which path computes this layer, and why."""
        a, b = self.lora_a.weight, self.lora_b.weight
        plain = self.has_plain_base()
        weight: Tensor | None = self.weight if plain else None  # pyright: ignore
        trains = a.requires_grad and b.requires_grad
        return choose_path(weight, a, b, plain_linear=plain, trains_a_and_b=trains)

    def has_plain_base(self) -> bool:
        """Whether the base computes `F.linear` on plain tensors, not on a tensor subclass."""
        return self.plain_forward and type(self.weight) in (Tensor, nn.Parameter)

    def oriented(self, weight: Tensor) -> Tensor:
        """`weight` as (out_features, in_features), or back; a base may store it transposed."""
        return weight

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """A and B under their names below this module."""
        return {"lora_a.weight": self.lora_a.weight, "lora_b.weight": self.lora_b.weight}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.state_dict`; while merged without A and B, which the weight then holds."""
        state = super().state_dict(*args, **kwargs)
        if self.merged:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            for key in _LORA_KEYS:
                state.pop(prefix + key, None)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        error_msgs: list[str] = args[4] if len(args) > 4 else kwargs["error_msgs"]
        if self.merged:
            error_msgs.append(
                f"{prefix.rstrip('.') or 'module'} is merged: loading now would be undone or "
                "doubled by unmerge; call unmerge(model) first"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._follow_base_off_meta()

    def _follow_base_off_meta(self) -> None:
        """Materialise A and B when loading with `assign=True` has materialised the base."""
        weight = getattr(self, "weight", None)
        if weight is None or weight.device.type == "meta":
            return
        for matrix in (self.lora_a, self.lora_b):
            if matrix.weight.device.type == "meta":
                matrix.to_empty(device=weight.device)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        lora = f"dim={self.dim}, alpha={self.alpha}, scale={self.scale:g}"
        return f"{super().extra_repr()}, {lora}, dropout_position={self.dropout_position!r}"

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
        """Freeze `obj` and give it A, B and their settings, in place.

        Args:
            obj: A linear: a `LinearAdapter` under construction, or a module that is being patched.
            dim: Rank of the update.
            alpha: Scaling numerator, `scale = alpha / dim`.
            dropout: Probability in [0, 1).
            dropout_position: `"pre"` or `"post"`.
            lora_A_init_method: `"xavier"` or `"uniform"`.
            lora_dtype: Dtype of A and B; None takes the base weight's.

        Raises:
            ValueError: An option is out of range, or the base is quantised without `lora_dtype`.
        """
        options = BranchOptions(
            dim=dim,
            alpha=alpha,
            dropout=dropout,
            dropout_position=dropout_position,
            lora_A_init_method=lora_A_init_method,
            lora_dtype=lora_dtype,
        )
        add_branch(obj, options)


class TransposedAdapter(LoRAMixin):
    """The branch over a linear whose weight is (in_features, out_features): GPT-2's `Conv1D`."""

    @property
    def in_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Width of the input."""
        return features(self)[0]

    @property
    def out_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Width of the output."""
        return features(self)[1]

    def oriented(self, weight: Tensor) -> Tensor:
        """`weight` as (out_features, in_features), or back."""
        return weight.t()


def add_branch(module: nn.Module, options: BranchOptions, seed: int | None = None) -> None:
    """Freeze a linear and give it A, B and their settings, in place; its class stays.

    Args:
        module: A linear that can be adapted.
        options: The branch's options.
        seed: Seed for A, or None for torch's default CPU generator.

    Raises:
        ValueError: The base is quantised and `options.lora_dtype` is None.
    """
    weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    dtype = options.resolve_dtype(weight.dtype)
    n_in, n_out = features(module)
    lora_a = LoRAMatrix(
        n_in, options.dim, options.lora_A_init_method, seed=seed, device=weight.device, dtype=dtype
    )
    lora_b = LoRAMatrix(options.dim, n_out, "zeros", device=weight.device, dtype=dtype)
    dropout = nn.Dropout(options.dropout)
    for child in (lora_a, lora_b, dropout):
        child.train(module.training)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    settings = {
        "dim": options.dim,
        "alpha": options.alpha,
        "scale": options.scale,
        "dropout_position": options.dropout_position,
        "adapter_enabled": True,
        "merged": False,
        "unmerged_weight": None,
    }
    for name, value in settings.items():
        setattr(module, name, value)
    module.dropout, module.lora_a, module.lora_b = dropout, lora_a, lora_b
