"""`Format`: what a way of packing weights says of a linear, for everybody who asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bridge.peft.dtypes import TRAINABLE_DTYPES
from bridge.peft.errors import AdapterError

#: The names of classes that were asked for; the compiler looks through a dict, not a cache.
_NAMES: dict[type, frozenset[str]] = {}


class Format(ABC):
    """One way of packing the weight of a linear.

    What a module holds is asked for once, as `packed`; the other questions are about that. A
    new format is a subclass and a line in `table.FORMATS`.

    Attributes:
        library: The package that it is of.
    """

    library: ClassVar[str]
    #: True if the input's gradient is known to be right, so that nothing has to be tried.
    gives_input_gradient: ClassVar[bool] = False

    @abstractmethod
    def holds(self, module: nn.Module) -> bool:
        """Whether a module's weight is packed so; it may be adapted, and on any device."""

    @abstractmethod
    def packed(self, module: nn.Module) -> Any:
        """What the module holds: values and scales."""

    @abstractmethod
    def kind(self, packed: Any) -> str:
        """What a user calls it: `"nf4, double quantised"`."""

    @abstractmethod
    def tensors(self, packed: Any) -> list[Tensor]:
        """All tensors that it takes, the packed values first, then scales and tables."""

    @abstractmethod
    def dense(self, packed: Any) -> Tensor:
        """The weight that the base computes with: a new tensor, (out_features, in_features)."""

    def settings(self, packed: Any) -> dict[str, Any] | None:
        """What it takes to pack a weight alike, ready for JSON; None if that is not known."""
        return None

    def makes(self, settings: Mapping[str, Any]) -> bool:
        """Whether `pack` takes these settings, that some format of the same library gave."""
        return False

    def pack(self, weight: Tensor, settings: Mapping[str, Any]) -> Any:
        """Quantise a dense weight, (out_features, in_features), by the settings of another.

        Raises:
            AdapterError: It cannot be done here.
        """
        raise AdapterError(
            f"weights of {self.library} ({settings.get('kind', 'unknown')}) cannot be quantised "
            "again here; merge(model) without requantize writes dense weights"
        )

    def put(self, module: nn.Module, packed: Any) -> None:
        """Make a module that was packed so hold this instead; shared objects are not written to."""
        raise NotImplementedError

    def prepare(self, module: nn.Module) -> str | None:
        """Make a module fit for training, in place; what the user should know of it."""
        return None

    def label(self, module: nn.Module) -> str:
        """`"nf4, double quantised (bitsandbytes)"`."""
        return f"{self.kind(self.packed(module))} ({self.library})"

    def told(self, module: nn.Module) -> tuple[str, dict[str, Any] | None] | None:
        """Label and settings of a module that is packed so, sharded or whole; None of another."""
        if not self.holds(module):
            return None
        return self.label(module), self.settings(self.packed(module))


def class_names(module: nn.Module | Tensor) -> frozenset[str]:
    """The full names of a module's or tensor's class and those below it.

    By these a library's classes are known without importing it.
    """
    cls = type(module)
    if cls not in _NAMES:
        _NAMES[cls] = frozenset(f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
    return _NAMES[cls]


def of_library(thing: object) -> str:
    """The package that the class of a thing comes from, the one next below an adapter's.

    Args:
        thing: A module or a tensor.
    """
    ours = __name__.partition(".")[0] + "."
    modules = (base.__module__ for base in type(thing).__mro__)
    return next(m for m in modules if not m.startswith(ours)).partition(".")[0]


def input_dtypes(module: nn.Module) -> list[torch.dtype]:
    """The dtypes in which a quantised linear may take its input, the likeliest first.

    Args:
        module: What it says it computes in counts, then its weight's nominal dtype, then those of
            its bias and its scales.
    """
    own = [*module._parameters.values(), *module._buffers.values()]
    weight = getattr(module, "weight", None)
    is_nominal = isinstance(weight, Tensor) and tuple(weight.shape) == (
        getattr(module, "out_features", None),
        getattr(module, "in_features", None),
    )
    found = [getattr(module, "compute_dtype", None)]
    found += [weight.dtype] if is_nominal else []  # pyright: ignore[reportOptionalMemberAccess]
    found += [t.dtype for t in own if t is not None and t is not weight]
    found += [torch.bfloat16, torch.float32, torch.float16]
    return [dtype for dtype in dict.fromkeys(found) if dtype in TRAINABLE_DTYPES]


def byte_size(tensor: Tensor) -> int:
    """The bytes that a tensor's values take; of a subclass those of the tensors inside it."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or hasattr(tensor, "device_mesh"):
        return tensor.numel() * tensor.element_size()
    return sum(byte_size(getattr(tensor, name)) for name in flatten()[0])
