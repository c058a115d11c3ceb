"""Quantised linears that are no `nn.Linear`: GPTQ, AWQ, HQQ, and those of libraries to come."""

from __future__ import annotations

from torch import Tensor, nn

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.quantised.input_gradients import no_gradient_reason
from bridge.peft.branch.quantised.table import format_of
from bridge.peft.branch.untouched import NOT_A_LINEAR

#: What such classes are called, whoever wrote them.
_WORD = "linear"


class PackedLinearAdapter(LoRAMixin):
    """A packed linear + LoRA; the base keeps its own forward and its own keys.

    It is known by its name, its widths and the integers that it stores, so that none of the
    libraries need be installed, and one that is not known here works too.
    """

    takes_functions = False

    @classmethod
    def takes(cls, base_type: type[nn.Module]) -> bool:
        """Whether a class is called a linear and is not torch's, nor ours."""
        if issubclass(base_type, cls):
            return True
        is_known = base_type.__module__.startswith(("torch.", "bridge."))
        return _WORD in base_type.__name__.lower() and not is_known

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why it cannot be adapted: it is not packed, or its input gets no gradient."""
        form = format_of(module)
        if form is None:
            return NOT_A_LINEAR
        return super().refusal(module) or no_gradient_reason(module, form)

    @classmethod
    def features(cls, module: nn.Module) -> tuple[int, int]:
        """`(in_features, out_features)`; 0 for what a module that is not packed does not say."""
        return getattr(module, "in_features", 0), getattr(module, "out_features", 0)

    @classmethod
    def weight_of(cls, module: nn.Module) -> Tensor:
        """The packed values: there need be no `weight`, or one that is no tensor."""
        form = format_of(module)
        assert form is not None
        return form.tensors(form.packed(module))[0]

    @property
    def base_weight(self) -> Tensor:
        """The packed values."""
        return self.weight_of(self)

    def _follow_base_off_meta(self) -> None:
        """Nothing is done: such a base is loaded before it is adapted."""
