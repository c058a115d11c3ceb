"""`adapter_config.json` of Hugging Face PEFT: read and checked field by field, and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.peft.fields import checked_fields, wrong
from bridge.peft.formats.peft.names import NameMatcher, Pattern, most_common_and_exceptions
from bridge.peft.formats.peft.regexes import Budget

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


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """A PEFT LoRA config whose values have the right types and can all be honoured.

    Attributes:
        r: Rank where `rank_pattern` says nothing.
        lora_alpha: Alpha where `alpha_pattern` says nothing.
        target_modules: Which modules are adapted; None for `"all-linear"`.
        exclude_modules: Which modules are not.
        rank_pattern: Ranks by regex on the end of the name.
        alpha_pattern: Alphas likewise.
        lora_dropout: Probability that an element of a branch's input is dropped.
        use_rslora: `scale = alpha / sqrt(r)`.
        use_dora: Each module has a magnitude beside A and B.
        layers_to_transform: Indices of the layers to adapt; empty for all.
        layers_pattern: Names, of dotted parts, of the module lists that hold the layers.
        modules_to_save: Ends of the names of modules that are saved whole.
        bias: `"none"`, `"lora_only"` or `"all"`: which biases the file holds.
        fan_in_fan_out: Whether the base's weights are transposed, (in_features, out_features).
        target_parameters: Ends of the names of adapted parameters, of dotted parts.
        trainable_token_indices: Tokens whose rows are trained, by the end of the name of their
            embedding; that of the input embedding is empty.
    """

    r: int
    lora_alpha: float
    target_modules: NameMatcher | None
    exclude_modules: NameMatcher
    rank_pattern: Pattern[int]
    alpha_pattern: Pattern[float]
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    layers_to_transform: frozenset[int] = frozenset()
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    fan_in_fan_out: bool = False
    target_parameters: tuple[str, ...] = ()
    trainable_token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def is_target(self, fqn: str) -> bool:
        """Whether PEFT would adapt the module of this name; `"all-linear"` needs the model.

        Args:
            fqn: A fully qualified name.
        """
        assert self.target_modules is not None
        if self.is_excluded(fqn) or fqn not in self.target_modules:
            return False
        # PEFT looks at the layer only where the whole name is not listed
        if not self.layers_to_transform or fqn in self.target_modules.names:
            return True
        return _layer_of(fqn, self.layers_pattern) in self.layers_to_transform

    def is_excluded(self, fqn: str) -> bool:
        """Whether the config keeps the module of this name from being adapted.

        Args:
            fqn: A fully qualified name.
        """
        dotted = f".{fqn}."
        saved = any(f".{name}." in dotted for name in self.modules_to_save)
        return saved or fqn in self.exclude_modules


def _layer_of(fqn: str, patterns: tuple[str, ...]) -> int | None:
    """The first number in a name that stands behind one of the patterns, or behind any part."""
    parts = fqn.split(".")
    for pattern in patterns:
        lists = pattern.split(".")
        for i in range(len(lists), len(parts) - 1):
            if parts[i - len(lists) : i] == lists and parts[i].isdecimal():
                return int(parts[i])
    # with no pattern PEFT wants two parts before the number
    rest = () if patterns else parts[2:-1]
    return next((int(part) for part in rest if part.isdecimal()), None)


def parse_config(config: Any) -> PeftConfig:
    """Check a decoded `adapter_config.json`.

    Args:
        config: Whatever the JSON held.

    Raises:
        AdapterFileError: A field has a wrong type or a value that cannot be honoured.
    """
    if not isinstance(config, dict):
        raise wrong("the file", config, "an object")
    values = checked_fields(config)
    targets = values.setdefault("target_modules", ())
    if not targets and not values.get("target_parameters"):
        raise AdapterFileError(
            "adapter_config.json: target_modules is empty; list the names of the adapted modules"
        )
    if isinstance(targets, str) and values.get("layers_to_transform"):
        raise AdapterFileError(
            "adapter_config.json: layers_to_transform needs target_modules as a list; write the "
            "layers into the regex instead"
        )
    values["layers_to_transform"] = frozenset(values.get("layers_to_transform", ()))
    budget = Budget()
    # 8 is PEFT's own default for both
    values = {"r": 8, "lora_alpha": 8, "exclude_modules": ()} | values
    for name in ("target_modules", "exclude_modules"):
        values[name] = NameMatcher(values[name], f"adapter_config.json: {name}", budget)
    for name in ("rank_pattern", "alpha_pattern"):
        values[name] = Pattern(values.get(name, {}), f"adapter_config.json: {name}", budget)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        values["target_modules"] = None
    return PeftConfig(**values)


def scale_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)`: the same expressions as PEFT, bit for bit."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def alpha_for(scale: float, rank: int, use_rslora: bool = False) -> float:
    """The alpha that gives a scale at a rank, exactly wherever a float can say so."""
    alpha = scale * (math.sqrt(rank) if use_rslora else rank)
    near = (math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next(
        (a for a in (round(alpha), alpha, *near) if scale_of(a, rank, use_rslora) == scale), alpha
    )


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
