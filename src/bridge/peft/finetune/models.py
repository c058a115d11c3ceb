"""Load causal language models and tokenizers; on meta where no weights are needed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from bridge.peft.errors import AdapterError
from bridge.peft.formats.model_directory import check_no_adapter
from bridge.peft.parallel.parts import first_rows
from bridge.peft.tensors import full_tensor, is_sharded

# Set before transformers and TRL are imported: a training run reports to nobody.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Inside, these loggers say nothing below an error."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


# what these say while transformers is imported is about optional kernels that nothing here uses
quiet_imports = partial(quiet, "torchao", "torch.utils._pytree", "bitsandbytes")

with quiet_imports():
    import transformers
    import transformers.modeling_utils  # else imported by the lazy names below, and not quietly
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.distributed.configuration_utils import DistributedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SAMPLED_BYTES = 256
# what of a configuration does not tell one base model from another
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
_VOLATILE += ("distributed_config",)


def load_config(name: str) -> PreTrainedConfig:
    """Load a model's configuration from a directory or the Hub.

    Raises:
        AdapterError: there is no such model, it is not a causal language model, or an adapter lies
            beside it.
    """
    path = Path(name)
    written = "written by save_pretrained"
    if not name.strip():
        raise AdapterError(f"--model is empty; pass a directory {written}, or a Hub id")
    if path.is_file():
        raise AdapterError(f"{name} is a file; pass the model's directory or a Hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise AdapterError(f"{name} holds no config.json; pass a directory {written}")
    if path.is_dir():
        check_no_adapter(path)
    if not path.exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise AdapterError(f"no model directory {name}; pass one {written}, or a Hub id")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"no model at {name}: neither a local directory nor found on the Hub "
            f"({_first_line(error)}); pass a directory {written}, or a Hub id"
        ) from error


def meta_model(
    config: PreTrainedConfig, name: str, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build the model on meta: every module and shape, no weight; `dtype=None` takes its own."""
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
        except ValueError as error:
            raise AdapterError(
                f"{name} is a {config.model_type} model, not a causal language model; "
                "pass one that AutoModelForCausalLM loads"
            ) from error


def load_model(
    name: str, dtype: torch.dtype, *, tensor_parallel: bool = False, **how: Any
) -> PreTrainedModel:
    """Load a model's weights in `dtype`; tensor parallel, each process loads its part of them.

    What is in `how` is for `from_pretrained`: to quantise the weights, say.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    parts = {"distributed_config": DistributedConfig(tp_plan="auto")} if tensor_parallel else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **parts, **how
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AdapterError(
            f"cannot load the weights of {name} ({_first_line(error)}); "
            "pass a directory written by save_pretrained"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise AdapterError(
            f"{name} lacks {len(missing)} of the model's weights, {missing[0]} for one; "
            "they would be random: pass a complete checkpoint"
        )
    return model


def load_tokenizer(name: str) -> Any:
    """Load a model's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizer files fail in as many ways as there are formats
        line = _first_line(error)
        reason = "" if line.endswith(":") else f" ({line})"  # a colon begins a list of guesses
        raise AdapterError(
            f"no tokenizer in {name}{reason}; save one there with tokenizer.save_pretrained"
        ) from error


def model_digest(model: PreTrainedModel) -> str:
    """Identify a base model by its configuration and the first bytes of every parameter."""
    config = model.config.to_dict()
    for volatile in _VOLATILE:
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        first = _first_values(parameter).contiguous().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(first.view(torch.uint8).numpy().tobytes()[:_SAMPLED_BYTES])
    return digest.hexdigest()


def _first_values(parameter: torch.Tensor) -> torch.Tensor:
    """At most `_SAMPLED_BYTES` values; where the parameter is sharded, all processes must call."""
    values = parameter.detach()
    if is_sharded(values) and values.dim() == 2:
        values = first_rows(values, -(-_SAMPLED_BYTES // values.shape[1]))
    return full_tensor(values).flatten()[:_SAMPLED_BYTES]


def length_limit(config: PreTrainedConfig) -> int | None:
    """Return how many positions the model knows, if its configuration says so."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def stop_ids(name: str, config: PreTrainedConfig) -> set[int]:
    """Return the tokens on which the model's generation stops, as its files say."""
    try:
        stops = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # it has no such file: generation then follows the model's configuration
        stops = getattr(config.get_text_config(), "eos_token_id", None)
    return set(stops) if isinstance(stops, list) else set() if stops is None else {stops}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
