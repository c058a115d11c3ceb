"""The fields of `adapter_config.json`: honoured with values of which kind, ignored, or refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from bridge.peft.errors import AdapterFileError
from bridge.peft.model.walk import some_names

#: Largest rank that a file may ask for.
MAX_RANK = 65_536
#: Most entries that a list or a pattern of the config may have.
MAX_ENTRIES = 20_000
#: Most of those that each name of a model is compared with, one by one.
_MAX_PLAIN_NAMES = 1_000
_MAX_LAYER = 100_000
#: Most tokens that a vocabulary may have.
MAX_TOKENS = 10_000_000

#: Fields that change nothing about the function of the adapter.
_IGNORED = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core"),
        *("peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config"),
        # each belongs to an initialisation, which says itself whether the base was changed
        *("task_type", "eva_config", "corda_config", "loftq_config", "lora_ga_config"),
    )
)
#: Fields that must stay off, and what they would switch on.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow routing",
    "ensure_weight_tying": "adapters tied between modules",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "lora_bias": "a bias on B",
    "megatron_config": "Megatron parallel layers",
    "monteclora_config": "Monte Carlo LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
#: `init_lora_weights` that leave the base as it is; what A and B are the file says anyway.
_HARMLESS_INITS = ("gaussian", "eva", "mica", "orthogonal")


def is_number(value: Any) -> bool:
    """Whether a decoded JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_dropout(value: Any) -> bool:
    """Whether a decoded JSON value is a probability below 1."""
    return is_number(value) and 0 <= value < 1


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    return is_number(value) and abs(value) <= 1e9


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_bias(value: Any) -> bool:
    return value in ("none", "lora_only", "all")


def _is_layer(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_LAYER


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_TOKENS


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000


def _is_plain_name(value: Any) -> bool:
    return _is_name(value) and re.fullmatch(r"[\w.-]+", value) is not None


#: What a value is checked with, and what it must be in words.
_Check = tuple[Callable[[Any], bool], str]
_RANK: _Check = (_is_rank, f"an integer from 1 to {MAX_RANK}")
_ALPHA: _Check = (_is_alpha, "a finite number of at most 1e9")
_FLAG: _Check = (_is_flag, "true or false")
_NAMES: _Check = (_is_name, "a list of names")
_PLAIN_NAMES: _Check = (
    _is_plain_name,
    f"at most {_MAX_PLAIN_NAMES} names of modules (letters, digits, dots)",
)
_VALUES: dict[str, _Check] = {
    "r": _RANK,
    "lora_alpha": _ALPHA,
    "lora_dropout": (is_dropout, "a number in [0, 1)"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "bias": (_is_bias, "'none', 'lora_only' or 'all'"),
    "fan_in_fan_out": _FLAG,
}
#: Each item of a list; a value that is not a list stands for a list of it.
_LISTS: dict[str, _Check] = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": (_is_layer, "a layer's index or a list of them"),
    "layers_pattern": _PLAIN_NAMES,
    "modules_to_save": _PLAIN_NAMES,
    "target_parameters": _PLAIN_NAMES,
}
#: Each value of an object.
_PATTERNS: dict[str, _Check] = {"rank_pattern": _RANK, "alpha_pattern": _ALPHA}
_REGEX_OR_NAMES = ("target_modules", "exclude_modules")
_TOKENS = "trainable_token_indices"
_HONOURED = frozenset((*_VALUES, *_LISTS, *_PATTERNS, _TOKENS))


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether a decoded `adapter_config.json` is one of mlx_lm.

    Args:
        config: The decoded file.
    """
    return "peft_type" not in config and ("lora_parameters" in config or "num_layers" in config)


def check_method(config: Mapping[str, Any]) -> None:
    """Raise `AdapterFileError` unless a config is one of PEFT's for LoRA.

    Args:
        config: The decoded file.
    """
    if is_mlx(config):
        raise AdapterFileError(
            "the adapter is in the format of mlx_lm; bridge-peft convert DIR --to peft reads it"
        )
    if config.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"adapter_config.json: peft_type is {_show(config.get('peft_type'))}; only 'LORA' can "
            "be read"
        )


def checked_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that are honoured, but those at null; lists as tuples.

    Args:
        config: The decoded file.

    Raises:
        AdapterFileError: A value is of a wrong kind, or a field cannot be honoured.
    """
    check_method(config)
    _refuse_what_cannot_be_honoured(config)
    given = {name: value for name, value in config.items() if value is not None}
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name in _VALUES:
            fields[name] = _checked(name, value, _VALUES[name])
        elif name in _REGEX_OR_NAMES and isinstance(value, str):
            fields[name] = value
        elif name in _LISTS:
            is_right, wanted = _LISTS[name]
            items = value if isinstance(value, list) else [value]
            most = _MAX_PLAIN_NAMES if is_right is _is_plain_name else MAX_ENTRIES
            if len(items) > most or not all(map(is_right, items)):
                raise wrong(name, value, wanted)
            fields[name] = tuple(items)
        elif name == _TOKENS:
            fields[name] = _checked_tokens(value)
        elif name in _PATTERNS:
            if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
                raise wrong(name, value, f"an object of at most {MAX_ENTRIES} entries")
            check = _PATTERNS[name]
            fields[name] = {k: _checked(f"{name}[{k[:80]!r}]", v, check) for k, v in value.items()}
    return fields


def wrong(name: str, value: Any, wanted: str) -> AdapterFileError:
    """The error for a value of a wrong kind.

    Args:
        name: The field.
        value: What it holds.
        wanted: What it must be.
    """
    return AdapterFileError(f"adapter_config.json: {name} must be {wanted}, got {_show(value)}")


def _checked(name: str, value: Any, check: _Check) -> Any:
    is_right, wanted = check
    if not is_right(value):
        raise wrong(name, value, wanted)
    return value


def _checked_tokens(value: Any) -> dict[str, tuple[int, ...]]:
    """Indices of tokens by the name of an embedding; a mere list is the input embedding's."""
    by_name = value if isinstance(value, dict) else {"": value}
    for name, tokens in by_name.items():
        is_right = isinstance(tokens, list) and len(tokens) <= MAX_TOKENS
        if not (is_right and (name == "" or _is_name(name)) and all(map(_is_token, tokens))):
            wanted = f"a list of at most {MAX_TOKENS} indices of tokens, or such lists by name"
            raise wrong(_TOKENS, value, wanted)
        if len({*tokens}) < len(tokens):
            raise wrong(_TOKENS, value, "indices of different tokens")
    return {name: tuple(tokens) for name, tokens in by_name.items() if tokens}


def _refuse_what_cannot_be_honoured(config: dict[str, Any]) -> None:
    unknown: list[str] = []
    for name, value in config.items():
        if name in _HONOURED or name in _IGNORED or name == "init_lora_weights":
            continue
        if value in (None, False, "", [], {}):
            continue
        if name in _REFUSED:
            raise AdapterFileError(
                f"adapter_config.json: {name}={_show(value)} means {_REFUSED[name]}, which is not "
                "supported yet; merge the adapter with the tool that made it"
            )
        unknown.append(name if name.isidentifier() else _show(name))
    init = config.get("init_lora_weights")
    is_harmless = isinstance(init, str) and init.lower() in _HARMLESS_INITS
    if not (init is None or isinstance(init, bool) or is_harmless):
        raise AdapterFileError(
            f"adapter_config.json: init_lora_weights={_show(init)} changes the base weights, so "
            "the adapter does not fit the plain base; save it again in PEFT with "
            "path_initial_model_for_weight_conversion"
        )
    if unknown:
        warnings.warn(
            f"adapter_config.json: {some_names(unknown)}: unknown here and ignored, as PEFT does",
            stacklevel=2,
        )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
