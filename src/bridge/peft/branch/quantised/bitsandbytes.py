"""bitsandbytes: `Linear4bit` (nf4, fp4, double quantised or not) and `Linear8bitLt`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft._optional import quantiser_library
from bridge.peft.branch.quantised.format import Format, class_names
from bridge.peft.dtypes import dtype_name

_LINEAR_4BIT = "bitsandbytes.nn.modules.Linear4bit"
_STATES = ("absmax", "code", "offset")


class FourBit(Format):
    """`Linear4bit`: two values a byte, in blocks with a scale each; packed is a `Params4bit`.

    The scales may be quantised in turn ("double quantised", Dettmers et al., 2023,
    arXiv:2305.14314).
    """

    library = "bitsandbytes"
    gives_input_gradient = True

    def holds(self, module: nn.Module) -> bool:
        """Whether it is a `Linear4bit` whose weight is quantised already and whole."""
        if _LINEAR_4BIT not in class_names(module):
            return False
        return getattr(module._parameters.get("weight"), "quant_state", None) is not None

    def packed(self, module: nn.Module) -> Any:
        """The `Params4bit`, with its `quant_state`."""
        return module._parameters["weight"]

    def kind(self, packed: Any) -> str:
        """`"nf4"` or `"fp4"`, and whether the scales are quantised too."""
        state = packed.quant_state
        return state.quant_type + (", double quantised" if packed.compress_statistics else "")

    def tensors(self, packed: Any) -> list[Tensor]:
        """Values, scales, tables."""
        states = [packed.quant_state, getattr(packed.quant_state, "state2", None)]
        found = [getattr(state, name, None) for state in states for name in _STATES]
        return [packed.data.view(torch.uint8), *(t for t in found if isinstance(t, Tensor))]

    def dense(self, packed: Any) -> Tensor:
        """The weight in the dtype that it had before it was quantised."""
        bnb = quantiser_library("bitsandbytes")
        data, state = packed.data, packed.quant_state
        if _is_laid_out_for_inference(state):
            data, state = _laid_out_for_training(data, copy.deepcopy(state))
        return bnb.functional.dequantize_4bit(data, state)

    def settings(self, packed: Any) -> dict[str, Any]:
        """Type, block size, double quantised, dtype before, and dtype of the storage."""
        return {
            "kind": packed.quant_state.quant_type,
            "double_quantised": packed.compress_statistics,
            "block_size": packed.blocksize,
            "dtype": dtype_name(packed.quant_state.dtype),
            "storage": dtype_name(packed.quant_storage),
        }

    def makes(self, settings: Mapping[str, Any]) -> bool:
        """nf4 and fp4."""
        return settings.get("kind") in ("nf4", "fp4")

    def pack(self, weight: Tensor, settings: Mapping[str, Any]) -> Any:
        """Quantise as `Linear4bit` does when it is moved to its device."""
        bnb = quantiser_library("bitsandbytes")
        fresh = bnb.nn.Params4bit(
            weight.to(getattr(torch, settings["dtype"])),
            requires_grad=False,
            quant_type=settings["kind"],
            compress_statistics=settings["double_quantised"],
            blocksize=settings["block_size"],
            quant_storage=getattr(torch, settings["storage"]),
        )
        return fresh.to(weight.device)

    def told(self, module: nn.Module) -> tuple[str, dict[str, Any] | None] | None:
        """Label and settings; sharded, the module's own pointer to the state is what is left."""
        state: Any = getattr(module, "quant_state", None)
        if self.holds(module) or state is None or _LINEAR_4BIT not in class_names(module):
            return super().told(module)
        packed = SimpleNamespace(
            quant_state=state,
            compress_statistics=state.nested,
            blocksize=state.blocksize,
            quant_storage=module.quant_storage,
        )
        return f"{self.kind(packed)} ({self.library})", self.settings(packed)

    def put(self, module: nn.Module, packed: Any) -> None:
        """Weight and the module's own pointer to its state."""
        packed.module = module
        module._parameters["weight"] = packed
        vars(module)["quant_state"] = packed.quant_state

    def prepare(self, module: nn.Module) -> str | None:
        """Keep it from the CPU layout for inference, and bring it back from there.

        bitsandbytes changes to that layout in the first evaluation on a machine with AVX-512, for
        good, and it has no backward: the layers below would silently learn from half of their
        gradient.
        """
        module.support_avx512bf16_for_cpu = False  # pyright: ignore
        weight = self.packed(module)
        if not _is_laid_out_for_inference(weight.quant_state):
            return None
        weight.data, weight.quant_state = _laid_out_for_training(weight.data, weight.quant_state)
        vars(module)["quant_state"] = weight.quant_state
        return (
            "an evaluation before had laid it out for inference on this CPU, which has no backward "
            "and rounds the scales to bfloat16; load the model again to train on the exact scales"
        )


class EightBit(Format):
    """`Linear8bitLt`: a byte a value and a scale a row; packed is the pair of these.

    It quantises its input too, row by row (Dettmers et al., 2022, arXiv:2208.07339).
    """

    library = "bitsandbytes"
    gives_input_gradient = True

    def holds(self, module: nn.Module) -> bool:
        """Whether it is a `Linear8bitLt` whose weight is quantised already."""
        weight = module._parameters.get("weight")
        is_int8 = getattr(weight, "dtype", None) == torch.int8
        return is_int8 and "bitsandbytes.nn.modules.Linear8bitLt" in class_names(module)

    def packed(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Values, (out_features, in_features), and the largest magnitude of each row."""
        weight: Any = module._parameters["weight"]
        state: Any = module.state
        scales = weight.SCB if state.SCB is None else state.SCB  # the first forward moves it
        return weight.data, scales

    def kind(self, packed: Any) -> str:
        """int8."""
        return "int8"

    def tensors(self, packed: Any) -> list[Tensor]:
        """Values and scales."""
        return [*packed]

    def dense(self, packed: Any) -> Tensor:
        """The weight in float32: `values · scale / 127`."""
        values, scales = packed
        return values.float() * (scales.float() / 127.0).unsqueeze(1)

    def settings(self, packed: Any) -> dict[str, Any]:
        """The kind says all."""
        return {"kind": "int8"}

    def makes(self, settings: Mapping[str, Any]) -> bool:
        """int8."""
        return settings.get("kind") == "int8"

    def pack(self, weight: Tensor, settings: Mapping[str, Any]) -> Any:
        """Quantise as `Linear8bitLt` does when it is moved to its device: through float16."""
        bnb = quantiser_library("bitsandbytes")
        values, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
        return values, scales

    def put(self, module: nn.Module, packed: Any) -> None:
        """Weight, and a state of its own that has seen no forward yet."""
        bnb = quantiser_library("bitsandbytes")
        values, scales = packed
        weight = bnb.nn.Int8Params(
            values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales
        )
        before: Any = module.state
        state = bnb.MatmulLtState()
        state.threshold, state.has_fp16_weights = before.threshold, before.has_fp16_weights
        state.use_pool = before.use_pool
        module._parameters["weight"] = weight
        vars(module)["state"] = state


def _is_laid_out_for_inference(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _laid_out_for_training(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    convert = quantiser_library("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse
    return convert(data, state)
