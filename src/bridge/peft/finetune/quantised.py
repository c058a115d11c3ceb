"""`--quantize`: the base's linears are quantised as they are loaded (QLoRA), by bitsandbytes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from bridge.peft._optional import quantiser_library
from bridge.peft.errors import AdapterError
from bridge.peft.finetune.options import TrainingOptions
from bridge.peft.finetune.ranks import process_count
from bridge.peft.model.size import model_size

if TYPE_CHECKING:
    from torch import nn


def quantising(
    options: TrainingOptions, dtype: torch.dtype, config: Any, name: str
) -> dict[str, Any]:
    """What `from_pretrained` takes so that it quantises; empty where nothing is to be quantised.

    Args:
        options: Their `quantize` is `"nf4"` (Dettmers et al., 2023, arXiv:2305.14314, scales
            quantised too) or `"int8"` (Dettmers et al., 2022, arXiv:2208.07339).
        dtype: In which the linears compute.
        config: The model's configuration.
        name: The model's name, for messages.

    Raises:
        AdapterError: The model is quantised already, or cannot be sharded when it is.
        MissingExtraError: bitsandbytes is not installed.
    """
    if (kind := options.quantize) is None:
        return {}
    can_be_sharded = {"nf4": ("ddp", "fsdp"), "int8": ("ddp",)}[kind]
    if process_count() > 1 and options.parallel not in can_be_sharded:
        raise AdapterError(
            f"--quantize {kind} does not train with --parallel {options.parallel}; pass "
            f"--parallel {' or '.join(can_be_sharded)}"
        )
    if (held := getattr(config, "quantization_config", None)) is not None:
        method = held.get("quant_method") if isinstance(held, dict) else held.quant_method
        raise AdapterError(
            f"{name} is quantised already ({method}); leave out --quantize, or pass the model in "
            "16 bits"
        )
    quantiser_library("bitsandbytes")
    import transformers

    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return {
        "quantization_config": transformers.BitsAndBytesConfig(**settings),
        "device_map": {"": device},
    }


def memory_of_base(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """The bytes of a base as it is stored, and of the same in `dtype`.

    Args:
        model: The loaded model, not adapted.
        dtype: Of the weights that are not quantised.
    """
    size = model_size(model)
    dense = sum(part.parameters * dtype.itemsize - part.bytes for part in size.quantised)
    return {"base_bytes": size.bytes, "dense_base_bytes": size.bytes + dense}
