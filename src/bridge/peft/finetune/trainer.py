"""TRL's `SFTTrainer`, with the same batches and small checkpoints on any number of processes."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bridge.peft import optimizer_groups, save_adapter
from bridge.peft.branch.initializers import derive_seed
from bridge.peft.finetune.batches import BLANK, BatchLoader, GlobalBatches, WithBlank, targets
from bridge.peft.finetune.checkpoint import (
    Checkpoint,
    load_optimizer_state,
    optimizer_state,
    publish,
    random_states,
    set_random_state,
    write_state,
)
from bridge.peft.finetune.models import quiet_imports
from bridge.peft.finetune.options import TrainingOptions
from bridge.peft.finetune.prepare import Prepared
from bridge.peft.finetune.processes import told_together
from bridge.peft.finetune.ranks import part_of_batch, process_index
from bridge.peft.finetune.record import PARTIAL

with quiet_imports():
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import EvalLoopOutput
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer


class AdapterTrainer(SFTTrainer):
    """An `SFTTrainer` whose checkpoints are small, complete or absent, and continue bit for bit.

    `checkpoint-N` holds the adapter's files, the state of training (`checkpoint.py`) and the
    trainer's. It is written under `.partial` by the first process and renamed when nothing is
    missing, so a process killed at any moment leaves the newest complete checkpoint as it was. The
    newest `keep` stay; `before` is the state that this process started from.

    Args:
        keep: How many checkpoints.
        batch_size: Samples in a batch of the whole run.
        parts: Among how many processes they are shared out.
        sharded: The model is sharded already, so nothing wraps it.
        lora_plus_ratio: Learning rate of B over that of everything else.
        **kwargs: As `SFTTrainer` takes them.
    """

    model: Any  # never None here, nor are these
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *,
        keep: int,
        batch_size: int,
        parts: int,
        sharded: bool,
        lora_plus_ratio: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._lora_plus_ratio = lora_plus_ratio
        self.before = TrainerState()
        self.parts = parts
        self._keep, self._batch_size, self._sharded = keep, batch_size, sharded
        self._part = process_index() % parts
        self._root = Path(str(self.args.output_dir))
        self._resumed: dict[str, Any] = {}
        if sharded:  # autocast only: the model's own hooks gather weights and reduce gradients
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)
        # the processes see other samples, so they drop other elements of them
        torch.manual_seed(self.args.seed + self._part)

    def train_from(self, start: Checkpoint | None) -> None:
        """Train from a checkpoint whose adapter the model carries already, or from the start.

        Of a run's last checkpoint, just take over.
        """
        if start is None:
            self.train()
            return
        self._resumed = start.state
        self.before = TrainerState.load_from_json(str(start.path / TRAINER_STATE_NAME))
        if self.before.global_step >= self.args.max_steps:
            # the process died between its last step and its report; Trainer would do one more
            self.state = self.before
        else:
            self.train(resume_from_checkpoint=str(start.path))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's own, with B in a group of its own where its learning rate is another."""
        if self.optimizer is None and self._lora_plus_ratio != 1:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = optimizer_groups(
                self.model,
                lr=settings.pop("lr"),
                b_ratio=self._lora_plus_ratio,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = kind(groups, **settings)
        return super().create_optimizer(model)

    def get_train_dataloader(self) -> BatchLoader:
        """This process's part of each batch, in an order that the seed and the epoch decide."""
        return self._loader(self.train_dataset, seed=self.args.seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> BatchLoader:
        """This process's part of the evaluation data."""
        return self._loader(self.eval_dataset, seed=None)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """As Trainer's; the tokens of a blank sample are none."""
        if not targets(inputs["labels"]):
            inputs = {**inputs, "attention_mask": torch.zeros_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The mean loss of a token over all data: Trainer's own depends on the batches."""
        self.model.eval()
        device = self.args.device
        total, tokens = torch.zeros((), device=device), torch.zeros((), device=device)
        for inputs in dataloader:
            count = targets(inputs["labels"]).to(device)
            loss, _, _ = self.prediction_step(self.model, inputs, prediction_loss_only=True)
            assert loss is not None
            total, tokens = total + loss * count, tokens + count
        total, tokens = self.accelerator.reduce((total, tokens))
        return EvalLoopOutput(
            predictions=(),  # pyright: ignore[reportArgumentType]
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": (total / tokens).item()},
            num_samples=len(dataloader.dataset),
        )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self._order_buckets(model)
        return model, loader

    def _order_buckets(self, model: nn.Module) -> None:
        """Let DDP order its buckets before the first step, and not after it.

        Where a gradient lies in a bucket decides in which order three processes or more add it up:
        a resumed run would round its first step otherwise than a run that went on.
        """
        blank = self._prepare_inputs(self.data_collator([WithBlank([])[BLANK]]))
        model.train()
        with torch.random.fork_rng():
            model(**{**blank, "labels": None}).logits.sum().backward()
        model.zero_grad()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Hide tensor parallelism from accelerate: it refuses it on CPU and has no part in it."""
        args = super()._build_accelerator_args(**kwargs)
        args.pop("parallelism_config", None)
        return args

    def _loader(self, samples: Any, *, seed: int | None) -> BatchLoader:
        batches = GlobalBatches(
            len(samples), self._batch_size, part=self._part, parts=self.parts, seed=seed
        )
        return BatchLoader(
            WithBlank(samples),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # else each pass would draw from the one of dropout
        )

    def save_adapter_to(self, directory: Path) -> None:
        """Write the adapter's files; every process must call, the first one writes."""
        if self._sharded:  # gathered by all; it tells all of them what became of it
            save_adapter(self.model, directory)
            return
        with told_together():
            if self.args.should_save:
                save_adapter(self.model, directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter was loaded before the model was sharded."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer_state(self.optimizer, self.model, self._resumed["optimizer"])
            self.lr_scheduler.load_state_dict(self._resumed["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            place = f"step {self.before.global_step}, part {self._part}"
            set_random_state(self._resumed["random"], derive_seed(self.args.seed, place))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._resumed["scaler"] is not None:
            scaler: Any = self.accelerator.scaler
            scaler.load_state_dict(self._resumed["scaler"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write where nobody looks for complete checkpoints, then publish."""
        scaler: Any = self.accelerator.scaler
        state = {
            "optimizer": optimizer_state(self.optimizer, self.model),
            "schedule": self.lr_scheduler.state_dict(),
            "random": random_states(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        name, partial = f"checkpoint-{self.state.global_step}", self._root / PARTIAL
        try:
            with told_together():
                if self.args.should_save:
                    shutil.rmtree(partial, ignore_errors=True)
                    (partial / name).mkdir(parents=True)
            self.save_adapter_to(partial / name)
            with told_together():
                if self.args.should_save:
                    write_state(partial / name, state)
                    self.state.save_to_json(str(partial / name / TRAINER_STATE_NAME))
                    publish(partial / name, self._root / name, keep=self._keep)
        finally:
            if self.args.should_save:  # a disk that is full gets the space back
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
            per_device_train_batch_size=part_of_batch(options),
            per_device_eval_batch_size=part_of_batch(options),
            gradient_accumulation_steps=options.gradient_accumulation,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            seed=options.seed,
            gradient_checkpointing=options.gradient_checkpointing,
            ddp_find_unused_parameters=False,
            eval_strategy="steps" if evaluate else "no",
            **_intervals(options, steps),
            eval_on_start=evaluate and not resumed,
            save_strategy="steps",
            logging_nan_inf_filter=False,  # a NaN must be seen
            save_only_model=True,  # the state of training is saved by us, whatever the sharding
            report_to=["tensorboard"],
            log_level_replica="error",
            ddp_timeout=options.timeout,
            disable_tqdm=True,
            include_num_input_tokens_seen="non_padding",
            max_length=None,
        )


def _intervals(options: TrainingOptions, steps: int) -> dict[str, Any]:
    tenth = math.ceil(steps / 10)
    return {
        "eval_steps": options.eval_every or tenth,
        "save_steps": options.save_every or tenth,
        "logging_steps": min(options.log_every or math.ceil(steps / 200), steps),
    }
