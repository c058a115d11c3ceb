"""TRL's `SFTTrainer` with checkpoints that hold the adapter alone and are published by a rename."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bridge.peft import load_adapter, save_adapter
from bridge.peft.finetune.models import quiet_imports
from bridge.peft.finetune.prepare import Prepared
from bridge.peft.finetune.record import PARTIAL, checkpoints

with quiet_imports():
    from transformers import Trainer, TrainerState
    from transformers.trainer import TRAINER_STATE_NAME
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer


class AdapterTrainer(SFTTrainer):
    """An `SFTTrainer` whose checkpoints are small, complete or absent, and continue bit for bit.

    `checkpoint-N` holds the adapter's files, the optimizer, the schedule, the random states and the
    trainer's state. It is written under `.partial` and renamed when nothing is missing, so a
    process killed at any moment leaves the newest complete checkpoint as it was. The newest `keep`
    stay; `before` is the state that this process started from.
    """

    model: Any  # never None here

    def __init__(self, *, keep: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.before = TrainerState()
        self._keep = keep
        self._root = Path(str(self.args.output_dir))
        self._writing_to = self._root

    def train_from(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint, or the start; of a run's last checkpoint, just take over."""
        if checkpoint is not None:
            self.before = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if self.before.global_step >= self.args.max_steps:
                # the process died between its last step and its report; Trainer would do one more
                self._load_from_checkpoint(str(checkpoint))
                self.state = self.before
                return
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            save_adapter(self.model, output_dir or self._root)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.model, resume_from_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let Trainer write where nobody looks for complete checkpoints, then publish."""
        name, partial = f"checkpoint-{self.state.global_step}", self._root / PARTIAL
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writing_to = partial
        try:
            # Trainer's own: SFTTrainer's would write a model card into the output as well
            Trainer._save_checkpoint(self, model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _publish(partial / name, self._root / name)
                for old in checkpoints(self._root)[: -self._keep]:
                    shutil.rmtree(old)
        finally:
            self._writing_to = self._root
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def not_cast_by_trl(model: nn.Module) -> Iterator[None]:
    """Hide that a model is quantised while a trainer is built: TRL would cast A and B to bfloat16.

    Args:
        model: An adapted model.
    """
    with contextlib.ExitStack() as stack:
        for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            if hasattr(model, mark):
                stack.callback(setattr, model, mark, getattr(model, mark))
                setattr(model, mark, False)
        yield


def trainer_config(prepared: Prepared, output: Path, *, resumed: bool) -> SFTConfig:
    """Translate our options into TRL's.

    A resumed run has its evaluation before training in its history already.
    """
    options, dtype, steps = prepared.spec.options, prepared.dtype, prepared.steps
    evaluate = bool(prepared.evaluation)
    tenth = math.ceil(steps / 10)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")
    schedule = "constant_with_warmup" if options.schedule == "constant" else options.schedule
    on_cuda = torch.cuda.is_available()
    with warnings.catch_warnings():
        # TRL's own default sets this alias, so every SFTConfig warns
        warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
        return SFTConfig(
            output_dir=str(output),
            max_steps=steps,
            use_cpu=not on_cuda,
            dataloader_pin_memory=on_cuda,
            learning_rate=options.learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=options.warmup,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            seed=options.seed,
            gradient_checkpointing=options.gradient_checkpointing,
            ddp_find_unused_parameters=False,
            eval_strategy="steps" if evaluate else "no",
            eval_steps=options.eval_every or tenth,
            eval_on_start=evaluate and not resumed,
            save_strategy="steps",
            save_steps=options.save_every or tenth,
            logging_steps=min(options.log_every or math.ceil(steps / 200), steps),
            logging_nan_inf_filter=False,  # a NaN must be seen
            report_to=["tensorboard"],
            disable_tqdm=True,
            include_num_input_tokens_seen="non_padding",
            max_length=None,
        )


def _publish(partial: Path, final: Path) -> None:
    """Make a finished checkpoint visible in one step, after its bytes reached the disk."""
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
