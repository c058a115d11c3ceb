"""One training run from its checks to its report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate import PartialState
from rich.console import Console

from bridge.peft import save_adapter
from bridge.peft.finetune.callbacks import ShowProgress, StopOnNan, StopOnSignal
from bridge.peft.finetune.disk import check_disk_space, disk_full_told
from bridge.peft.finetune.metrics import sizes, training_figures
from bridge.peft.finetune.models import load_model, model_digest, quiet_imports
from bridge.peft.finetune.prepare import Prepared, base_dtype, prepare
from bridge.peft.finetune.record import (
    RunSpec,
    check_same_run,
    checkpoint_to_resume,
    checkpoints,
    clear_run,
    write_record,
)
from bridge.peft.finetune.report import (
    plot_loss,
    print_summary,
    write_metrics,
)
from bridge.peft.finetune.samples import Sample
from bridge.peft.finetune.trainer import (
    AdapterTrainer,
    keep_packed_weights_trainable,
    taken_as_adapted,
    trainer_config,
)

with quiet_imports():
    from transformers import PrinterCallback
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXPECTED = (
    "The tokenizer has new PAD/BOS/EOS tokens",  # generation follows the tokenizer
    "Warning: The following arguments do not match",  # intervals may change on resuming
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        model: the adapted model, on the device it trained on.
        prepared: the data and the plan.
        metrics: what `metrics.json` will say; None where a signal stopped the run.
        signal: the number of that signal, or None.
    """

    model: PreTrainedModel
    prepared: Prepared
    metrics: dict[str, Any] | None
    signal: int | None


def dry_run(spec: RunSpec, output: Path, console: Console) -> None:
    """Check everything that can be checked without weights and print the plan; writes nothing."""
    prepared = prepare(spec)
    base_dtype(spec.options)
    check_disk_space(spec, prepared.plan, output)
    console.print(str(prepared.plan))
    for note in prepared.notes:
        console.print(note)
    console.print(
        f"Would train on {len(prepared.train)} samples and evaluate on "
        f"{len(prepared.evaluation)}; nothing was written."
    )


def train(
    spec: RunSpec, output: Path, console: Console, *, resume: bool, overwrite: bool
) -> Outcome:
    """Train, from the newest checkpoint where `resume`, and leave the adapter in `output`.

    Args:
        spec: the run; a resumed one with the digests it began with.
        output: where everything goes.
        console: for what the user should see.
        resume: continue the run in `output`.
        overwrite: remove the run that `output` holds, once all checks have passed.

    Raises:
        AdapterError: anything the user can mend; nothing was written then.
    """
    prepared = prepare(spec)
    dtype = base_dtype(spec.options)
    check_disk_space(spec, prepared.plan, output)
    for note in prepared.notes:
        console.print(note)
    model = load_model(spec.model, dtype)
    keep_packed_weights_trainable(model)
    config = trainer_config(
        spec.options,
        output,
        dtype=dtype,
        samples=len(prepared.train),
        evaluate=bool(prepared.evaluation),
        resumed=resume,
    )
    digests = {"base model": model_digest(model), **prepared.digests}
    started = replace(spec, digests=digests, world_size=config.world_size)
    start = None
    if resume:
        check_same_run(spec, started, output)
        start = checkpoint_to_resume(output, config.world_size)
    _adapt(model, spec, dtype, console)
    if not resume:
        _begin_record(started, output, overwrite=overwrite)
    trainer = _build_trainer(model, config, prepared, spec)
    with disk_full_told(output):
        return _run(trainer, prepared, output, console, start)


def train_and_report(
    spec: RunSpec, output: Path, console: Console, *, resume: bool, overwrite: bool
) -> int:
    """Train and leave metrics, the curve and a summary; see `train` for arguments and errors.

    Returns:
        0, or 128 + the number of the signal that stopped the run.
    """
    outcome = train(spec, output, console, resume=resume, overwrite=overwrite)
    if outcome.metrics is None:
        return exit_code_of_stopped(outcome, output, console)
    finish(spec, outcome.metrics, output, console)
    return 0


def finish(spec: RunSpec, metrics: dict[str, Any], output: Path, console: Console) -> None:
    """Write `metrics.json`, which marks the run as finished, and print the summary."""
    if PartialState().is_main_process:
        write_metrics(output, metrics)
    print_summary(console, output, metrics, spec.model)


def exit_code_of_stopped(outcome: Outcome, output: Path, console: Console) -> int:
    """Tell what was kept of a stopped run; return 128 + the number of the signal."""
    assert outcome.signal is not None
    _say_how_to_resume(output, console)
    return 128 + outcome.signal


def _say_how_to_resume(output: Path, console: Console) -> None:
    console.print(
        f"Stopped; kept {checkpoints(output)[-1].name}. Continue with: "
        f"bridge-peft finetune --resume --output {shlex.quote(str(output))}"
    )


def _adapt(model: PreTrainedModel, spec: RunSpec, dtype: torch.dtype, console: Console) -> None:
    """Adapt the model, in place."""
    lora = spec.lora
    quantized = getattr(model, "is_quantized", False)
    if lora.lora_dtype is None and (quantized or dtype != torch.float32):
        # a step of a bfloat16 weight below its 8 bits of precision would be no step at all
        lora = dataclasses.replace(lora, lora_dtype=torch.float32)
        base = "quantized" if quantized else str(dtype).removeprefix("torch.")
        console.print(f"adapter weights in float32 over a {base} base (--lora-dtype)")
    lora(model)


def _begin_record(spec: RunSpec, output: Path, *, overwrite: bool) -> None:
    """Write the record once every process has checked the output directory, before any goes on."""
    processes = PartialState()
    processes.wait_for_everyone()
    if processes.is_main_process:
        if overwrite:
            clear_run(output)
        write_record(output, spec)
    processes.wait_for_everyone()


def _build_trainer(
    model: PreTrainedModel, config: Any, prepared: Prepared, spec: RunSpec
) -> AdapterTrainer:
    tokenizer: Any = prepared.tokenizer
    padding = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with taken_as_adapted(model):
        return AdapterTrainer(
            keep=spec.options.keep_checkpoints,
            model=model,
            args=config,
            train_dataset=_dataset(prepared.train),
            eval_dataset=_dataset(prepared.evaluation) if prepared.evaluation else None,
            processing_class=tokenizer,
            # padding is masked out of attention and loss, so any id serves
            data_collator=DataCollatorForLanguageModeling(pad_token_id=padding),
        )


@contextlib.contextmanager
def _hold_back_chatter() -> Iterator[None]:
    """Hold back two remarks of transformers that tell of what is meant to be so."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_EXPECTED)

    logger = logging.getLogger("transformers.trainer_utils")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def _dataset(samples: list[Sample]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "input_ids": [sample.input_ids for sample in samples],
            "labels": [sample.labels for sample in samples],
        }
    )


def _run(
    trainer: AdapterTrainer,
    prepared: Prepared,
    output: Path,
    console: Console,
    start: Path | None,
) -> Outcome:
    stop, progress = StopOnSignal(console), ShowProgress(console)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(stop)
    trainer.add_callback(progress)
    trainer.add_callback(StopOnNan())
    begun = time.perf_counter()
    try:
        with stop, _hold_back_chatter():
            trainer.train_from(start)
    except KeyboardInterrupt:  # the second Ctrl-C
        if checkpoints(output):
            _say_how_to_resume(output, console)
        raise
    finally:
        progress.close()
    seconds = time.perf_counter() - begun
    model: Any = trainer.model
    if stop.stopped:
        return Outcome(model=model, prepared=prepared, metrics=None, signal=stop.received)
    if trainer.args.should_save:
        save_adapter(model, output)
        plot_loss(trainer.state.log_history, output / "loss.png")
    trainer.accelerator.wait_for_everyone()
    metrics = {
        **training_figures(
            trainer, seconds=seconds, evaluation_seconds=progress.evaluation_seconds
        ),
        **sizes(trainer, prepared, output),
    }
    return Outcome(model=model, prepared=prepared, metrics=metrics, signal=None)
