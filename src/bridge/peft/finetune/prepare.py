"""What a run needs before a weight is loaded: samples, the plan, and what would go wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bridge.peft.demo.defaults import DEMO_EXAMPLES
from bridge.peft.demo.tasks import word_examples
from bridge.peft.errors import AdapterError
from bridge.peft.finetune.data import Row, data_digest, read_rows, rows_of
from bridge.peft.finetune.models import (
    length_limit,
    load_config,
    load_tokenizer,
    meta_model,
    stop_ids,
)
from bridge.peft.finetune.options import TrainingOptions, total_steps
from bridge.peft.finetune.quantised import quantising
from bridge.peft.finetune.ranks import process_count
from bridge.peft.finetune.record import RunSpec
from bridge.peft.finetune.samples import Sample, fit_length, remarks_of, tokenize
from bridge.peft.finetune.shapes import Recognised, named, recognise
from bridge.peft.finetune.tokens import Tokenizer

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
        quantising: what makes `from_pretrained` quantise the base.
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
    quantising: dict[str, Any] = field(default_factory=dict)


def prepare(spec: RunSpec) -> Prepared:
    """Read and check the data, the model's configuration and the recipe; writes nothing."""
    train_rows, eval_rows = _rows(spec)
    options, dtype = spec.options, base_dtype(spec.options)
    config = load_config(spec.model)
    check_can_be_sharded(config, spec)
    how = quantising(options, dtype, config, spec.model)
    notes: list[str | None] = []
    # the plan knows every target, so a mistaken one is told before any weight is loaded
    plan = spec.lora.plan(meta_model(config, spec.model, dtype))
    tokenizer = load_tokenizer(spec.model)
    data = _recognised(train_rows, eval_rows, tokenizer)
    stops = stop_ids(spec.model, config)
    notes += [note for part in data.values() for note in part.notes]
    notes += _stop_note(tokenizer, stops)
    limit = _max_length(options, config)
    splits: dict[str, list[Sample]] = {"data": [], "evaluation data": []}
    for name, part in data.items():
        samples = tokenize(part.rows, part.shape, tokenizer, stop_ids=stops)
        _check_vocabulary(samples, config, spec.model)
        notes += remarks_of(samples, name)
        splits[name], note = fit_length(
            samples, limit, options.on_long, limit=length_limit(config), name=name
        )
        notes.append(note)
    train, evaluation = splits.values()
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
        quantising=how,
    )


def base_dtype(options: TrainingOptions) -> torch.dtype:
    """Return the dtype the base weights are loaded in."""
    on_cuda = torch.cuda.is_available()
    if options.dtype == "float16" and not on_cuda:
        raise AdapterError("--dtype float16 trains on CUDA only; pass bfloat16 or float32")
    if options.dtype is None:
        return torch.bfloat16 if on_cuda else torch.float32
    return getattr(torch, options.dtype)


def check_can_be_sharded(config: PreTrainedConfig, spec: RunSpec) -> None:
    """Raise `AdapterError` unless the model can be trained as `--parallel` says."""
    options = spec.options
    if process_count() == 1 or options.parallel == "ddp":
        return
    if options.dtype == "float16":
        raise AdapterError("--dtype float16 trains with --parallel ddp only; pass bfloat16")
    if options.parallel == "tp" and not getattr(config, "base_model_tp_plan", None):
        raise AdapterError(
            f"transformers has no tensor parallel plan for a {config.model_type} model; pass "
            "--parallel fsdp"
        )
    if spec.demo:
        raise AdapterError("the demo keeps the whole model on each process; pass --parallel ddp")


def _steps(options: TrainingOptions, samples: int) -> int:
    """Count the run's steps and check that the warm-up is over before they are."""
    steps = total_steps(options, samples)
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
    evaluation = read_rows(spec.eval_data, evaluation=True) if spec.eval_data else []
    return read_rows(spec.data), evaluation


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


def _recognised(train: list[Row], evaluation: list[Row], tokenizer: Any) -> dict[str, Recognised]:
    has_template = bool(tokenizer.chat_template)
    data = {"data": recognise(train, has_chat_template=has_template)}
    if evaluation:
        name = "evaluation data"
        data[name] = recognise(evaluation, name=name, has_chat_template=has_template)
    shapes = [part.shape for part in data.values()]
    if len(set(shapes)) > 1:
        raise AdapterError(
            f"the data has rows of {shapes[0]} but the evaluation data has rows of {shapes[1]}; "
            "give both the same"
        )
    return data


def _stop_note(tokenizer: Any, stops: set[int]) -> list[str]:
    """Say so where samples are closed by a token on which generation does not stop."""
    end = tokenizer.eos_token_id
    if end is None or not stops or end in stops:
        return []
    known = named(tokenizer.convert_ids_to_tokens(stop) for stop in sorted(stops))
    return [
        f"the tokenizer ends a text with {tokenizer.eos_token} but the model's generation stops on "
        f"{known}: pass eos_token_id={end} to generate()"
    ]


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
