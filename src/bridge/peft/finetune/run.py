"""One training run from its checks to its report."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from rich.console import Console

from bridge.peft import load_adapter
from bridge.peft.finetune.callbacks import ShowProgress, StopOnNan, StopOnSignal
from bridge.peft.finetune.checkpoint import Checkpoint, read_state
from bridge.peft.finetune.disk import check_disk_space, disk_full_told
from bridge.peft.finetune.models import load_model, model_digest, quiet, quiet_imports
from bridge.peft.finetune.prepare import Prepared, prepare
from bridge.peft.finetune.processes import joined, told_together
from bridge.peft.finetune.quantised import memory_of_base
from bridge.peft.finetune.ranks import data_parts, process_count, process_index
from bridge.peft.finetune.record import (
    METRICS,
    RunSpec,
    check_same_run,
    checkpoints,
    clear_run,
    passed_over,
    resume_command,
    write_json,
    write_record,
)
from bridge.peft.finetune.report import plot_loss, print_summary, run_metrics
from bridge.peft.finetune.samples import Sample
from bridge.peft.finetune.sharding import shard
from bridge.peft.finetune.trainer import AdapterTrainer, not_cast_by_trl, trainer_config
from bridge.peft.model.agreement import check_ranks_agree, check_same_facts

with quiet_imports():
    from transformers import PrinterCallback
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: without `metrics` and with its number where a signal stopped it."""

    model: PreTrainedModel
    metrics: dict[str, Any] | None
    signal: int | None = None


def dry_run(spec: RunSpec, output: Path, console: Console) -> None:
    """Check everything that can be checked without weights and print the plan; writes nothing."""
    prepared = _prepare(spec, output)
    for line in (str(prepared.plan), *prepared.notes):
        console.print(line)
    console.print(
        f"Would train on {len(prepared.train)} samples and evaluate on "
        f"{len(prepared.evaluation)}; nothing was written."
    )


def train(
    spec: RunSpec, output: Path, console: Console, *, resume: bool, overwrite: bool
) -> Outcome:
    """Train, from the newest checkpoint where `resume`, and leave the adapter in `output`.

    With `overwrite` a run in the way is removed, once all checks have passed; nothing is written
    where one fails.
    """
    with joined(spec.options.timeout, output):
        check_same_facts({"the recipe": vars(spec.lora), "the options": vars(spec.options)})
        with told_together():
            prepared = _prepare(spec, output)
        for note in prepared.notes:
            console.print(note)
        with told_together():
            start = _newest(output, console) if resume else None
            model, started, memory = _adapted(prepared, output, start)
        check_ranks_agree(model, {"the data": prepared.digests})
        with told_together():
            if not resume and process_index() == 0:
                _begin_record(started, output, overwrite=overwrite)
        trainer = _build_trainer(model, prepared, output, resumed=resume)
        with disk_full_told(output):
            outcome = _run(trainer, prepared, output, console, start)
    if outcome.metrics is not None:
        outcome.metrics.update(memory, quantize=spec.options.quantize)
    return outcome


def finish(spec: RunSpec, outcome: Outcome, output: Path, console: Console) -> int:
    """Write `metrics.json`, which marks a run as finished, and print the summary; the exit code."""
    if outcome.metrics is None:
        assert outcome.signal is not None
        _say_how_to_resume(output, console)
        return 128 + outcome.signal
    if process_index() == 0:
        write_json(output / METRICS, outcome.metrics)
    print_summary(console, output, outcome.metrics, spec.model)
    return 0


def _prepare(spec: RunSpec, output: Path) -> Prepared:
    prepared = prepare(spec)
    check_disk_space(prepared.plan, output, keep=spec.options.keep_checkpoints)
    return prepared


def _say_how_to_resume(output: Path, console: Console) -> None:
    kept = checkpoints(output)[-1].name
    console.print(f"Stopped; kept {kept}. Continue with: {resume_command(output)}")


def _newest(output: Path, console: Console) -> Checkpoint:
    for line in passed_over(output):
        console.print(line)
    newest = checkpoints(output)[-1]
    start = Checkpoint(path=newest, state=read_state(newest))
    if (before := len(start.state["random"])) != process_count():
        console.print(
            f"{newest.name} was written by {before} processes and this run has {process_count()}: "
            "dropout goes on with other random numbers"
        )
    return start


def _adapted(
    prepared: Prepared, output: Path, start: Checkpoint | None
) -> tuple[PreTrainedModel, RunSpec, dict[str, int]]:
    """The base with its adapter, from a checkpoint or the start; the run as it is; its bytes."""
    spec = prepared.spec
    in_parts = spec.options.parallel == "tp" and process_count() > 1
    how = prepared.quantising
    model = load_model(spec.model, prepared.dtype, tensor_parallel=in_parts, **how)
    memory = memory_of_base(model, prepared.dtype)
    digests = {"base model": model_digest(model), **prepared.digests}
    started = replace(spec, digests=digests, world_size=process_count())
    if start:
        check_same_run(spec, started, output)
    spec.lora(model)
    return load_adapter(model, start.path) if start else model, started, memory


def _begin_record(spec: RunSpec, output: Path, *, overwrite: bool) -> None:
    if overwrite:
        clear_run(output)
    write_record(output, spec)


def _build_trainer(
    model: PreTrainedModel, prepared: Prepared, output: Path, *, resumed: bool
) -> AdapterTrainer:
    options = prepared.spec.options
    is_sharded = shard(model, options.parallel)
    tokenizer: Any = prepared.tokenizer
    padding = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with not_cast_by_trl(model):
        trainer = AdapterTrainer(
            keep=options.keep_checkpoints,
            batch_size=options.batch_size,
            parts=data_parts(options),
            sharded=is_sharded,
            lora_plus_ratio=options.lora_plus_ratio,
            model=model,
            args=trainer_config(prepared, output, resumed=resumed),
            train_dataset=_dataset(prepared.train),
            eval_dataset=_dataset(prepared.evaluation) if prepared.evaluation else None,
            processing_class=tokenizer,
            # padding is masked out of attention and loss, so any id serves
            data_collator=DataCollatorForLanguageModeling(pad_token_id=padding),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _dataset(samples: list[Sample]) -> datasets.Dataset:
    ids, labels = [s.input_ids for s in samples], [s.labels for s in samples]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


def _run(
    trainer: AdapterTrainer,
    prepared: Prepared,
    output: Path,
    console: Console,
    start: Checkpoint | None,
) -> Outcome:
    stop, progress = StopOnSignal(console), ShowProgress(console)
    for callback in (stop, progress, StopOnNan()):
        trainer.add_callback(callback)
    begun = time.perf_counter()
    try:
        # transformers warns that generation follows the tokenizer, of intervals that may change;
        # bitsandbytes at each call of an 8-bit linear that it casts the input
        with (
            stop,
            progress,
            quiet("transformers.trainer_utils", "bitsandbytes.autograd._functions"),
        ):
            trainer.train_from(start)
    except KeyboardInterrupt:  # the second Ctrl-C
        if checkpoints(output):
            _say_how_to_resume(output, console)
        raise
    seconds = time.perf_counter() - begun
    model: Any = trainer.model
    if stop.stopped:
        return Outcome(model=model, metrics=None, signal=stop.received)
    trainer.save_adapter_to(output)
    with told_together():
        if trainer.args.should_save:
            plot_loss(trainer.state.log_history, output / "loss.png")
    return Outcome(model=model, metrics=run_metrics(trainer, prepared, output, seconds=seconds))
