"""One training run from its checks to its report."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from accelerate import PartialState
from rich.console import Console

from bridge.peft import save_adapter
from bridge.peft.finetune.callbacks import ShowProgress, StopOnNan, StopOnSignal
from bridge.peft.finetune.disk import check_disk_space, disk_full_told
from bridge.peft.finetune.models import load_model, model_digest, quiet, quiet_imports
from bridge.peft.finetune.prepare import Prepared, prepare
from bridge.peft.finetune.record import (
    METRICS,
    RunSpec,
    check_same_run,
    checkpoint_to_resume,
    checkpoints,
    clear_run,
    resume_command,
    write_json,
    write_record,
)
from bridge.peft.finetune.report import plot_loss, print_summary, run_metrics
from bridge.peft.finetune.samples import Sample
from bridge.peft.finetune.trainer import (
    AdapterTrainer,
    not_cast_by_trl,
    trainer_config,
)

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
        check_same_facts({"library": __version__, "run": json.dumps(spec.to_json())})
        with told_together():
            prepared = _prepare(spec, output)
        for note in prepared.notes:
            console.print(note)
        config = trainer_config(prepared, output, resumed=resume)
        with told_together():
            start = checkpoint_to_resume(output, console) if resume else None
            model, started = _adapted(prepared, output, start)
        check_ranks_agree(model)
        with told_together():
            if not resume and config.should_save:
                _begin_record(started, output, overwrite=overwrite)
        with told_together():
            state = read_state(start) if start else {}
            trainer = _build_trainer(model, config, prepared)
        if start and len(state["random"]) != process_count():
            console.print(f"{start.name} is of {len(state['random'])} processes: dropout differs")
        with disk_full_told(output):
            return _run(trainer, prepared, output, console, start, state)


def finish(spec: RunSpec, outcome: Outcome, output: Path, console: Console) -> int:
    """Write `metrics.json`, which marks a run as finished, and print the summary; the exit code."""
    if outcome.metrics is None:
        assert outcome.signal is not None
        _say_how_to_resume(output, console)
        return 128 + outcome.signal
    if PartialState().is_main_process:
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


def _begin_record(spec: RunSpec, output: Path, *, overwrite: bool) -> None:
    """Write the record once every process has checked the output directory, before any goes on."""
    processes = PartialState()
    processes.wait_for_everyone()
    if processes.is_main_process:
        if overwrite:
            clear_run(output)
        write_record(output, spec)
    processes.wait_for_everyone()


def _build_trainer(model: PreTrainedModel, config: Any, prepared: Prepared) -> AdapterTrainer:
    tokenizer: Any = prepared.tokenizer
    padding = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with not_cast_by_trl(model):
        trainer = AdapterTrainer(
            keep=prepared.spec.options.keep_checkpoints,
            model=model,
            args=config,
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
    trainer: AdapterTrainer, prepared: Prepared, output: Path, console: Console, start: Path | None
) -> Outcome:
    stop, progress = StopOnSignal(console), ShowProgress(console)
    for callback in (stop, progress, StopOnNan()):
        trainer.add_callback(callback)
    begun = time.perf_counter()
    try:
        # transformers warns that generation follows the tokenizer, and of intervals that may change
        with stop, progress, quiet("transformers.trainer_utils"):
            trainer.train_from(start)
    except KeyboardInterrupt:  # the second Ctrl-C
        if checkpoints(output):
            _say_how_to_resume(output, console)
        raise
    seconds = time.perf_counter() - begun
    model: Any = trainer.model
    if stop.stopped:
        return Outcome(model=model, metrics=None, signal=stop.received)
    if trainer.args.should_save:
        save_adapter(model, output)
        plot_loss(trainer.state.log_history, output / "loss.png")
    trainer.accelerator.wait_for_everyone()
    return Outcome(model=model, metrics=run_metrics(trainer, prepared, output, seconds=seconds))
