"""Transformer Engine's `Linear`, with whatever precision its own forward works in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft._optional import HAVE_TE, TELinear
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.options import DropoutPosition, InitMethod
from bridge.peft.errors import MissingExtraError, UnsupportedLinearError
from bridge.peft.tensors import is_plain

#: Settings of a `te.Linear`, beside its bias, that a copy carries on when it has them.
_SETTINGS = (
    *("return_bias", "parallel_mode", "tp_group", "tp_size", "sequence_parallel"),
    *("fuse_wgrad_accumulation", "get_rng_state_tracker", "rng_tracker_name"),
    *("symmetric_ar_type", "save_original_input"),
)


class TELinearAdapter(LoRAMixin, TELinear):
    """Transformer Engine linear + LoRA; `weight` and `bias` keep their names in the checkpoint.

    Copies `orig_linear` with its parallel and bias settings; `patch_linear_module` copies nothing.

    Args:
        orig_linear: The `transformer_engine.pytorch.Linear` to adapt.
        dim, alpha, …: The branch's options; see `BranchOptions`.

    Raises:
        ImportError: Transformer Engine is not installed.
        UnsupportedLinearError: `orig_linear` is not exactly a `te.Linear`, has split parameters,
            is sharded over several ranks, or holds fp8 weights.
        AlreadyAdaptedError: `orig_linear` is adapted already.
        ValueError: An option is out of range.
    """

    base_type = TELinear
    copies = "a te.Linear"
    input_name = "inp"
    takes_functions = True
    _base_is_running = False

    @classmethod
    def takes(cls, base_type: type[nn.Module]) -> bool:
        """Whether Transformer Engine is there and this is its linear, or a class below it."""
        return HAVE_TE and issubclass(base_type, TELinear)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why this linear cannot be adapted in place; None if it can."""
        if type(module) is not TELinear:
            return "subclasses of te.Linear answer with tuples of their own; wrap it in LoRALinear"
        if "weight" not in module._parameters:
            return "its weight is split (parameters_split); build it with parameters_split=None"
        if (ranks := getattr(module, "tp_size", 1)) > 1:
            return f"it is sharded over {ranks} ranks; wrap it in LoRALinear"
        return super().refusal(module)

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
        self.check_copyable(orig_linear)
        super().__init__(**_constructor_arguments(orig_linear))
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

    def bias_in_output(self) -> Tensor | None:
        """As the mixin's; none where the bias is returned beside the output, or there is none."""
        return self.bias if self.use_bias and not self.return_bias else None

    def weight_was_written(self) -> None:
        """Forget the fp8 copies of the weight that Transformer Engine caches."""
        super().weight_was_written()
        if workspaces := getattr(self, "_fp8_workspaces", None):
            workspaces.clear()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Any:
        """As `nn.Module.named_parameters`, except to Transformer Engine's own forward.

        That forward compares the input's dtype with every parameter below the module, children
        included, and would refuse A and B in another dtype, which it never multiplies with.
        """
        recurse = recurse and not self._base_is_running
        return super().named_parameters(prefix, recurse, remove_duplicate)


def _constructor_arguments(orig: TELinear) -> dict[str, Any]:
    """The arguments that build another `te.Linear` like `orig`, weights aside."""
    weight = orig.weight
    if not is_plain(weight):
        raise UnsupportedLinearError(
            f"cannot copy a te.Linear whose weight is a {type(weight).__name__} (fp8): writing it "
            "would quantise again; patch_linear_module adapts it in place"
        )
    settings = {name: getattr(orig, name, None) for name in _SETTINGS}
    return {
        "in_features": orig.in_features,
        "out_features": orig.out_features,
        "params_dtype": weight.dtype,
        "device": weight.device.type if weight.is_meta else weight.device,
        "bias": orig.use_bias,
        **{name: value for name, value in settings.items() if value is not None},
    }
