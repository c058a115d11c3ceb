"""transformers' `Conv1D` (GPT-2): a linear whose weight is (in_features, out_features)."""

from __future__ import annotations

from torch import Tensor, nn

from bridge.peft.branch.mixin import LoRAMixin


class Conv1DAdapter(LoRAMixin):
    """Conv1D + LoRA; known by the class's name, so that transformers need not be imported."""

    transposed = True
    takes_functions = True
    input_name = "x"

    @classmethod
    def takes(cls, base_type: type[nn.Module]) -> bool:
        """Whether this is `Conv1D` or derives from it."""
        names = {f"{base.__module__}.{base.__name__}" for base in base_type.__mro__}
        return "transformers.pytorch_utils.Conv1D" in names

    @classmethod
    def features(cls, module: nn.Module) -> tuple[int, int]:
        """`(in_features, out_features)`, which the weight alone knows."""
        weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
        return weight.shape[0], weight.shape[1]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.features(self)[0]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.features(self)[1]
