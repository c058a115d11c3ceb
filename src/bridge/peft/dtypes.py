"""The floating dtypes that everybody here means: what A and B, and a merged model, may be in."""

from __future__ import annotations

import torch

from bridge.peft.errors import AdapterError

#: The dtypes in which A and B can be trained, and a model can be written, by name.
FLOATING = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
TRAINABLE_DTYPES = tuple(FLOATING.values())
#: Their names in a safetensors header.
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def sound_dtype(base_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which A and B train soundly over a base weight.

    In 16 bits most steps of an optimizer round to nothing (bfloat16), or its state overflows
    (float16), so half-precision and quantised bases get float32.

    Args:
        base_dtype: The dtype of the base weight.
    """
    return torch.float64 if base_dtype == torch.float64 else torch.float32


def parse_dtype(word: str) -> torch.dtype:
    """Turn `bfloat16` or `torch.bfloat16` into `torch.bfloat16`.

    Raises:
        AdapterError: There is no such floating dtype.
    """
    name = word.removeprefix("torch.")
    if name not in FLOATING:
        raise AdapterError(f"unknown dtype {word!r}; pass one of {', '.join(FLOATING)}")
    return FLOATING[name]


def dtype_name(dtype: torch.dtype) -> str:
    """`"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
