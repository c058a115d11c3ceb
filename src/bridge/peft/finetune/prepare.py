"""What a run needs before a weight is loaded: samples, the plan, and what would go wrong."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from bridge.peft.demo.defaults import DEMO_EXAMPLES
from bridge.peft.demo.tasks import word_examples
from bridge.peft.dtypes import dtype_name
from bridge.peft.errors import AdapterError
from bridge.peft.finetune.data import (
    Row,
    Shape,
    data_digest,
    read_jsonl,
    rows_of,
    shape_of,
)
from bridge.peft.finetune.models import (
    length_limit,
    load_config,
    load_tokenizer,
    meta_model,
    quiet_imports,
)
from bridge.peft.finetune.options import TrainingOptions, total_steps
from bridge.peft.finetune.record import RunSpec
from bridge.peft.finetune.samples import Sample, Tokenizer, fit_length, tokenize

with quiet_imports():
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from bridge.peft.plan import Plan

_DEFAULT_MAX_LENGTH = 1024
_MOST_HELD_OUT = 512


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checked run, ready to load weights.

    Attributes:
        spec: the run, with the dtype of A and B that will be trained.
        dtype: of the base weights.
        digests: of the data, by name.
        notes: lines that tell what was decided for the user.
    """

    spec: RunSpec
    dtype: torch.dtype
    tokenizer: Tokenizer
    train: list[Sample]
    evaluation: list[Sample]
    plan: Plan
    steps: int
    digests: dict[str, str]
    notes: list[str]


def prepare(spec: RunSpec) -> Prepared:
    """Read and check the data, the model's configuration and the recipe; writes nothing."""
    train_rows, eval_rows = _rows(spec)
    shape = shape_of(train_rows)
    if eval_rows and (other := shape_of(eval_rows)) != shape:
        raise AdapterError(
            f"the data has {shape} columns but the evaluation data has {other}; give both the same"
        )
    options, dtype = spec.options, base_dtype(spec.options)
    config = load_config(spec.model)
    spec, note = _settle_lora_dtype(spec, config, dtype)
    notes = [note]
    # the plan knows every target, so a mistaken one is told before any weight is loaded
    plan = spec.lora.plan(meta_model(config, spec.model, dtype))
    tokenizer = load_tokenizer(spec.model)
    template, note = _chat_template(tokenizer, shape, spec.model)
    notes.append(note)
    limit = _max_length(options, config)
    splits: list[list[Sample]] = []
    for rows in (train_rows, eval_rows):
        samples = tokenize(rows, shape, tokenizer, template)
        _check_vocabulary(samples, config, spec.model)
        if samples:
            samples, note = fit_length(samples, limit, options.on_long, limit=length_limit(config))
            notes.append(note)
        splits.append(samples)
    train, evaluation = splits
    if not evaluation:
        train, evaluation, note = _hold_out(train, options)
        notes.append(note)
    if tokenizer.eos_token_id is None:
        notes.append("the tokenizer has no end-of-sequence token: samples are not closed by one")
    rows_by_name = {"data": train_rows, "evaluation data": eval_rows}
    digests = {name: data_digest(rows) for name, rows in rows_by_name.items() if rows}
    return Prepared(
        spec=spec,
        dtype=dtype,
        tokenizer=tokenizer,
        train=train,
        evaluation=evaluation,
        plan=plan,
        steps=_steps(options, len(train)),
        digests=digests,
        notes=[note for note in notes if note],
    )


def base_dtype(options: TrainingOptions) -> torch.dtype:
    """Return the dtype the base weights are loaded in."""
    on_cuda = torch.cuda.is_available()
    if options.dtype == "float16" and not on_cuda:
        raise AdapterError("--dtype float16 trains on CUDA only; pass bfloat16 or float32")
    if options.dtype is None:
        return torch.bfloat16 if on_cuda else torch.float32
    return getattr(torch, options.dtype)


def _settle_lora_dtype(
    spec: RunSpec, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[RunSpec, str | None]:
    """Train A and B in float32 over a half-precision or quantised base, unless told otherwise."""
    quantised = getattr(config, "quantization_config", None) is not None
    if spec.lora.lora_dtype is not None or (dtype == torch.float32 and not quantised):
        return spec, None
    # a step of a bfloat16 weight below its 8 bits of precision would not be a step at all
    base = "quantised" if quantised else dtype_name(dtype)
    note = f"adapter weights in float32 over a {base} base (--lora-dtype)"
    return replace(spec, lora=replace(spec.lora, lora_dtype=torch.float32)), note


def _steps(options: TrainingOptions, samples: int) -> int:
    """Count the run's steps and check that the warm-up is over before they are."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # without torchrun, transformers trains on every GPU that it sees
    devices = processes if processes > 1 else max(torch.cuda.device_count(), 1)
    steps = total_steps(options, samples, devices=devices)
    if options.warmup >= steps:
        raise AdapterError(
            f"--warmup is {options.warmup:g} steps and the run has {steps}, so it would never "
            "reach its learning rate; pass fewer, or a share of the run below 1"
        )
    return steps


def _rows(spec: RunSpec) -> tuple[list[Row], list[Row]]:
    if spec.demo:
        train = word_examples("train", DEMO_EXAMPLES["train"])
        held_out = word_examples("held_out", DEMO_EXAMPLES["held_out"])
        return rows_of(train, "demo"), rows_of(held_out, "demo, held out")
    evaluation = read_jsonl(spec.eval_data, "--eval-data") if spec.eval_data else []
    return read_jsonl(spec.data), evaluation


def _max_length(options: TrainingOptions, config: PreTrainedConfig) -> int:
    limit = length_limit(config)
    if options.max_length is None:
        return min(_DEFAULT_MAX_LENGTH, limit or _DEFAULT_MAX_LENGTH)
    if limit is not None and options.max_length > limit:
        raise AdapterError(
            f"--max-length is {options.max_length} but the model knows {limit} positions; "
            f"pass {limit} or less"
        )
    return options.max_length


def _chat_template(tokenizer: Any, shape: Shape, model: str) -> tuple[str | None, str | None]:
    """Return a template that marks the assistant's words if there is one, and a line if not."""
    if shape != "messages":
        return None, None
    own = tokenizer.chat_template
    if own is None:
        raise AdapterError(
            f'the tokenizer of {model} has no chat template, which "messages" need; '
            'write "prompt" and "completion" rows, or set tokenizer.chat_template and save it'
        )
    own = own["default"] if isinstance(own, dict) else own
    if has_generation_markers(own):
        return own, None
    try:
        return get_training_chat_template(tokenizer), None
    except ValueError:
        return None, (
            "the chat template does not mark the assistant's words "
            "({% generation %}): loss on all tokens"
        )


def _hold_out(
    samples: list[Sample], options: TrainingOptions
) -> tuple[list[Sample], list[Sample], str]:
    count = min(round(options.eval_share * len(samples)), _MOST_HELD_OUT)
    if options.eval_share > 0 and len(samples) > 1:
        count = max(count, 1)
    if not count:
        return samples, [], "no evaluation: no --eval-data and nothing held out"
    chosen = set(random.Random(options.seed).sample(range(len(samples)), count))
    train = [sample for i, sample in enumerate(samples) if i not in chosen]
    held_out = [samples[i] for i in sorted(chosen)]
    note = (
        f"held out {count} of {len(samples)} samples for evaluation "
        "(--eval-data FILE for your own, --eval-share 0 for none)"
    )
    return train, held_out, note


def _check_vocabulary(samples: list[Sample], config: PreTrainedConfig, model: str) -> None:
    size = config.get_text_config().vocab_size
    largest = max((max(sample.input_ids) for sample in samples), default=0)
    if largest >= size:
        raise AdapterError(
            f"the tokenizer in {model} gives id {largest} but the model knows {size} tokens; "
            "pass the directory that both were saved in"
        )
