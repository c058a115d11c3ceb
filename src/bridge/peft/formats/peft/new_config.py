"""Write `adapter_config.json` as Hugging Face PEFT writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge.peft.formats.peft.targets import most_common_and_exceptions

#: The fields of PEFT's `LoraConfig` that every version since 0.14 knows, at their defaults. Newer
#: ones are left out at their defaults, so that older versions read the file without a warning.
_DEFAULTS: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "revision": None,
    "task_type": None,
    "base_model_name_or_path": None,
    "lora_dropout": 0.0,
    "use_dora": False,
    "use_rslora": False,
}


def new_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    target_modules: list[str] | str,
    **fields: Any,
) -> dict[str, Any]:
    """A PEFT LoRA config.

    Args:
        ranks: By fully qualified name; the most common becomes `r`, others `rank_pattern`.
        alphas: Likewise for `lora_alpha` and `alpha_pattern`.
        target_modules: Names or a regex.
        **fields: Other fields of the config, in place of PEFT's defaults.
    """
    rank, rank_pattern = most_common_and_exceptions(ranks)
    alpha, alpha_pattern = most_common_and_exceptions({f: _as_int(a) for f, a in alphas.items()})
    return {
        **_DEFAULTS,
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "target_modules": target_modules,
        **fields,
    }


def _as_int(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)
