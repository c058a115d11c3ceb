"""Optional packages, imported in this one place and never required by the core."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bridge.peft.errors import MissingExtraError

if TYPE_CHECKING:
    HAVE_TE: bool

    class TELinear(nn.Module):
        """What the type checker knows of `transformer_engine.pytorch.Linear`."""

        in_features: int
        out_features: int
        weight: nn.Parameter
        bias: torch.Tensor
        use_bias: bool
        return_bias: bool

        def __init__(self, in_features: int, out_features: int, **kwargs: Any) -> None: ...

else:
    try:
        from transformer_engine.pytorch import Linear as TELinear

        HAVE_TE = True
    except (ImportError, OSError):  # OSError: a CUDA library that the machine lacks
        HAVE_TE = False

        class TELinear(nn.Module):
            """Stands where `transformer_engine.pytorch.Linear` would; cannot be constructed."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                raise MissingExtraError(
                    "transformer_engine is not installed; pip install 'bridge-peft[te]' "
                    "(needs a CUDA build of torch)"
                )


def megatron_core(name: str) -> ModuleType:
    """A module of Megatron Core, imported when it is asked for: `"transformer.utils"`.

    Raises:
        MissingExtraError: Megatron Core is not installed.
    """
    try:
        return importlib.import_module(f"megatron.core.{name}")
    except ImportError as error:
        raise MissingExtraError(
            "megatron-core is not installed; pip install 'bridge-peft[megatron]'"
        ) from error


def quantiser_library(name: str) -> Any:
    """A module of bitsandbytes or torchao, imported when a weight of it is at hand.

    Args:
        name: Its full name.

    Raises:
        MissingExtraError: The package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingExtraError(
            f"{package} is not installed; pip install 'bridge-peft[quant]'"
        ) from error
