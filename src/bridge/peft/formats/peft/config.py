"""`adapter_config.json` of Hugging Face PEFT: what it says, checked field by field."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.peft.names import NameEnds, NameMatcher, NameRegex, Pattern
from bridge.peft.formats.peft.safe_regex import BoundedRegex, Budget

#: Largest rank that a file may ask for.
MAX_RANK = 65_536
#: Most entries that a list or a pattern of the config may have.
MAX_ENTRIES = 20_000
_MAX_LAYER = 100_000

#: Fields that change nothing about the function of the adapter.
_IGNORED = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core"),
        *("peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config"),
        *("task_type", "eva_config"),
    )
)
#: Fields that must stay off, and what they would switch on.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow routing",
    "corda_config": "CorDA",
    "ensure_weight_tying": "adapters tied between modules",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "loftq_config": "LoftQ, which changes the base weights",
    "lora_bias": "a bias on B",
    "lora_ga_config": "LoRA-GA, which changes the base weights",
    "megatron_config": "Megatron parallel layers",
    "monteclora_config": "Monte Carlo LoRA",
    "target_parameters": "adapters on parameters that are not a linear's weight",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
#: `init_lora_weights` that leave the base as it is; what A and B are the file says anyway.
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """A PEFT LoRA config whose values have the right types and can all be honoured.

    Attributes:
        r: Rank where `rank_pattern` says nothing.
        lora_alpha: Alpha where `alpha_pattern` says nothing.
        targets: Which modules are adapted; None for `"all-linear"`.
        lora_dropout: Probability that an element of a branch's input is dropped.
        use_rslora: `scale = alpha / sqrt(r)`.
        excluded: Which modules are not.
        layers_to_transform: Indices of the layers to adapt; None for all.
        layers_pattern: Names, of dotted parts, of the module lists that hold the layers.
        rank_pattern: Ranks by regex on the end of the name.
        alpha_pattern: Alphas likewise.
        modules_to_save: Ends of the names of modules that are saved whole.
        bias: `"none"`, `"lora_only"` or `"all"`: which biases the file holds.
        fan_in_fan_out: Whether the base stores its weights as (in_features, out_features).
    """

    r: int
    lora_alpha: float
    targets: NameMatcher | None
    rank_pattern: Pattern[int]
    alpha_pattern: Pattern[float]
    lora_dropout: float = 0.0
    use_rslora: bool = False
    excluded: NameMatcher = field(default_factory=NameEnds)
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    fan_in_fan_out: bool = False


def parse_config(config: Any) -> PeftConfig:
    """Check a decoded `adapter_config.json`.

    Args:
        config: Whatever the JSON held.

    Raises:
        AdapterFileError: A field has a wrong type or a value that cannot be honoured.
    """
    if not isinstance(config, dict):
        raise _wrong("the file", config, "an object")
    if config.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"adapter_config.json: peft_type is {_show(config.get('peft_type'))}; only 'LORA' can "
            "be read"
        )
    _refuse_what_cannot_be_honoured(config)
    values = {
        name: check(name, config[name])
        for name, check in _CHECKS.items()
        if config.get(name) is not None
    }
    _check_targets_given(values)
    budget = Budget()
    targets = values.pop("target_modules")
    is_all = isinstance(targets, str) and targets.lower() == "all-linear"
    excluded = values.pop("exclude_modules", ())
    patterns = {
        name: Pattern(values.pop(name, {}), f"adapter_config.json: {name}", budget)
        for name in ("rank_pattern", "alpha_pattern")
    }
    # 8 is PEFT's own default for both
    return PeftConfig(
        r=values.pop("r", 8),
        lora_alpha=values.pop("lora_alpha", 8),
        targets=None if is_all else _matcher("target_modules", targets, budget),
        excluded=_matcher("exclude_modules", excluded, budget),
        **patterns,
        **values,
    )


def _check_targets_given(values: dict[str, Any]) -> None:
    if not values.get("target_modules"):
        raise AdapterFileError(
            "adapter_config.json: target_modules is empty; list the names of the adapted modules"
        )
    if isinstance(values["target_modules"], str) and values.get("layers_to_transform"):
        raise AdapterFileError(
            "adapter_config.json: layers_to_transform needs target_modules as a list; write the "
            "layers into the regex instead"
        )


def _matcher(name: str, value: str | tuple[str, ...], budget: Budget) -> NameMatcher:
    if isinstance(value, str):
        return NameRegex(BoundedRegex(value, f"adapter_config.json: {name}", budget))
    return NameEnds(value)


def scale_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)`: the same expressions as PEFT, bit for bit."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def alpha_for(scale: float, rank: int, use_rslora: bool = False) -> float:
    """The alpha that gives a scale at a rank, exactly wherever a float can say so."""
    alpha = scale * (math.sqrt(rank) if use_rslora else rank)
    around = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in around if scale_of(a, rank, use_rslora) == scale), alpha)


def _refuse_what_cannot_be_honoured(config: dict[str, Any]) -> None:
    for name, value in config.items():
        if name in _CHECKS or name in _IGNORED or name == "init_lora_weights":
            continue
        if value in (None, False, "", [], {}):
            continue
        what = _REFUSED.get(name)
        shown = name if name.isidentifier() else _show(name)
        meaning = f"means {what}, which" if what else "is a field that"
        raise AdapterFileError(
            f"adapter_config.json: {shown}={_show(value)} {meaning} cannot be honoured here; merge "
            "the adapter with the tool that made it"
        )
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in _HARMLESS_INITS):
        raise AdapterFileError(
            f"adapter_config.json: init_lora_weights={_show(init)} changes the base weights, so "
            "the adapter does not fit the plain base; save it again in PEFT with "
            "path_initial_model_for_weight_conversion"
        )


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _wrong(name, value, f"an integer from 1 to {MAX_RANK}")
    return value


def _alpha(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= 1e9:
        raise _wrong(name, value, "a finite number of at most 1e9")
    return value


def _dropout(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise _wrong(name, value, "a number in [0, 1)")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _bias(name: str, value: Any) -> str:
    if value not in ("none", "lora_only", "all"):
        raise _wrong(name, value, "'none', 'lora_only' or 'all'")
    return value


def _name_list(name: str, value: Any) -> tuple[str, ...]:
    if (
        not isinstance(value, list)
        or len(value) > MAX_ENTRIES
        or not all(isinstance(item, str) and 0 < len(item) <= 1000 for item in value)
    ):
        raise _wrong(name, value, "a list of names")
    return tuple(value)


def _names_or_regex(name: str, value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _name_list(name, value)


def _plain_names(name: str, value: Any) -> tuple[str, ...]:
    values = _name_list(name, [value] if isinstance(value, str) else value)
    if not all(re.fullmatch(r"[\w.-]+", item) for item in values):
        raise _wrong(name, value, "names of modules (letters, digits, dots)")
    return values


def _layer_indices(name: str, value: Any) -> tuple[int, ...] | None:
    indices = [value] if type(value) is int else value
    if (
        not isinstance(indices, list)
        or len(indices) > MAX_ENTRIES
        or not all(type(index) is int and 0 <= index < _MAX_LAYER for index in indices)
    ):
        raise _wrong(name, value, "a layer's index or a list of them")
    return tuple(indices) or None


def _pattern(check: Callable[[str, Any], Any]) -> Callable[[str, Any], dict[str, Any]]:
    def check_pattern(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
            raise _wrong(name, value, f"an object of at most {MAX_ENTRIES} entries")
        return {key: check(f"{name}[{key[:80]!r}]", item) for key, item in value.items()}

    return check_pattern


#: The fields that are honoured, each with the check of its value.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "r": _rank,
    "lora_alpha": _alpha,
    "lora_dropout": _dropout,
    "use_rslora": _flag,
    "target_modules": _names_or_regex,
    "exclude_modules": _names_or_regex,
    "layers_to_transform": _layer_indices,
    "layers_pattern": _plain_names,
    "rank_pattern": _pattern(_rank),
    "alpha_pattern": _pattern(_alpha),
    "modules_to_save": _plain_names,
    "bias": _bias,
    "fan_in_fan_out": _flag,
}


def _wrong(name: str, value: Any, wanted: str) -> AdapterFileError:
    return AdapterFileError(f"adapter_config.json: {name} must be {wanted}, got {_show(value)}")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
