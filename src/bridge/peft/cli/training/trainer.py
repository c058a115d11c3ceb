"""TRL's `SFTTrainer` with checkpoints that hold the adapter alone and are published by a rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from bridge.peft import adapter_state_dict, save_adapter
from bridge.peft.cli.models import quiet_imports
from bridge.peft.cli.training.options import TrainingOptions
from bridge.peft.cli.training.record import PARTIAL, checkpoints
from bridge.peft.errors import AdapterError

with quiet_imports():
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

_TENTH_OF_RUN = 0.1
_200TH_OF_RUN = 0.005


class AdapterTrainer(SFTTrainer):
    """An `SFTTrainer` whose checkpoints are small, complete or absent, and continue bit for bit.

    `checkpoint-N` holds the adapter's files, the optimizer, the schedule, the random states and the
    trainer's state. It is written under `.partial` and renamed when nothing is missing, so a
    process killed at any moment leaves the newest complete checkpoint as it was.

    Args:
        keep: newest checkpoints kept.
        **kwargs: what `SFTTrainer` takes.
    """

    def __init__(self, *, keep: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._keep = keep
        self._root = Path(str(self.args.output_dir))
        self._writing_to = self._root

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            save_adapter(self.model, output_dir or self._root)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        restore_adapter(self.model, Path(resume_from_checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        with self._partial_directory() as partial:
            # Trainer's own: SFTTrainer's would write a model card into the output as well
            Trainer._save_checkpoint(self, model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _publish(partial / name, self._root / name)
                for old in checkpoints(self._root)[: -self._keep]:
                    shutil.rmtree(old)

    @contextlib.contextmanager
    def _partial_directory(self) -> Iterator[Path]:
        """Let Trainer write its checkpoint where nobody looks for complete ones."""
        partial = self._root / PARTIAL
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writing_to = partial
        try:
            yield partial
        except Exception as error:
            if _is_disk_full(error, self._root):
                raise AdapterError(self._disk_full()) from error
            raise
        finally:
            self._writing_to = self._root
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)

    def _disk_full(self) -> str:
        kept = checkpoints(self._root)
        step = self.state.global_step
        if not kept:
            return f"no space left on the disk at step {step}; free some and start again"
        return (
            f"no space left on the disk at step {step}; free some and continue from "
            f"{kept[-1].name}: bridge-peft finetune --resume --output {self._root}"
        )


def trainer_config(
    options: TrainingOptions, output: Path, *, dtype: torch.dtype, evaluate: bool, resumed: bool
) -> SFTConfig:
    """Translate our options into TRL's.

    Args:
        options: how to train.
        output: where checkpoints and logs go.
        dtype: of the base weights; half types train under autocast.
        evaluate: whether there is data to evaluate on.
        resumed: a resumed run has its evaluation before training in its history already.
    """
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")
    schedule = "constant_with_warmup" if options.schedule == "constant" else options.schedule
    on_cuda = torch.cuda.is_available()
    with warnings.catch_warnings():
        # TRL's own default sets this alias, so every SFTConfig warns
        warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
        return SFTConfig(
            output_dir=str(output),
            use_cpu=not on_cuda,
            dataloader_pin_memory=on_cuda,
            learning_rate=options.learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=options.warmup,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            num_train_epochs=options.epochs,
            max_steps=options.steps or -1,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            seed=options.seed,
            gradient_checkpointing=options.gradient_checkpointing,
            ddp_find_unused_parameters=False,
            eval_strategy="steps" if evaluate else "no",
            eval_steps=options.eval_every or _TENTH_OF_RUN,
            eval_on_start=evaluate and not resumed,
            save_strategy="steps",
            save_steps=options.save_every or _TENTH_OF_RUN,
            logging_steps=options.log_every or _200TH_OF_RUN,
            report_to=["tensorboard"],
            disable_tqdm=True,
            include_num_input_tokens_seen="non_padding",
            max_length=None,
        )


def restore_adapter(model: nn.Module, directory: Path) -> None:
    """Copy the adapter saved in `directory` into a model that carries one of the same shapes.

    Raises:
        AdapterError: the file lacks a tensor or has one of another shape.
    """
    saved = load_file(directory / "adapter_model.safetensors")
    for name, tensor in adapter_state_dict(model).items():
        key = f"base_model.model.{name}".replace("lora_a", "lora_A").replace("lora_b", "lora_B")
        if key not in saved or saved[key].shape != tensor.shape:
            raise AdapterError(f"{directory} holds no fitting {name}; remove it and resume again")
        tensor.copy_(saved[key])


def _publish(partial: Path, final: Path) -> None:
    """Make a finished checkpoint visible in one step, after its bytes reached the disk."""
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)


def _is_disk_full(error: Exception, where: Path) -> bool:
    """Tell a full disk, which torch and safetensors report as errors of their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return "No space left" in text or (
        "PytorchStreamWriter" in text and shutil.disk_usage(where).free < 2**20
    )
