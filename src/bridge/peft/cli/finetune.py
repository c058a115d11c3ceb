"""`bridge-peft finetune`: train an adapter with TRL's SFTTrainer; without arguments, the demo."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bridge.peft import LoRA
from bridge.peft.cli.flags import takes_fields_of
from bridge.peft.cli.imports import finetune_imports
from bridge.peft.demo.defaults import DEMO_LORA, DEMO_TRAINING
from bridge.peft.demo.tasks import base_model_dir
from bridge.peft.errors import AdapterError
from bridge.peft.finetune.options import TrainingOptions
from bridge.peft.finetune.ranks import part_of_batch
from bridge.peft.finetune.record import (
    RunSpec,
    checkpoints,
    continue_spec,
    existing_run,
    is_finished,
)

_DEMO_OUTPUT = Path("runs/demo")


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


@takes_fields_of(lora=LoRA, options=TrainingOptions, skip={"lora": ["seed"]})
def command(
    model: Annotated[str | None, _option("Base model: a directory or a Hub id.")] = None,
    data: Annotated[str | None, _option("Data: JSONL, a JSON array, CSV or Parquet.")] = None,
    eval_data: Annotated[str | None, _option("Data to evaluate on.")] = None,
    output: Annotated[Path | None, _option("Directory for everything that the run writes.")] = None,
    resume: Annotated[bool, _option("Continue the run in --output.", "--resume")] = False,
    overwrite: Annotated[bool, _option("Replace the run in --output.", "--overwrite")] = False,
    dry_run: Annotated[
        bool, _option("Check everything and print the plan; train nothing.", "--dry-run")
    ] = False,
    *,
    lora: dict[str, Any],
    options: dict[str, Any],
) -> int:
    """Train a LoRA adapter on your data; with no --model and no --data, run the embedded demo.

    Example: bridge-peft finetune --model ./llama --data train.jsonl --output runs/first --dim 16

    On several GPUs: torchrun --nproc-per-node 2 -m bridge.peft finetune --parallel fsdp …
    """
    demo = model is None and data is None
    output = output or (_DEMO_OUTPUT if demo else None)
    if output is None:
        raise AdapterError("nowhere to write; pass a directory with --output")
    if resume and overwrite:
        raise AdapterError("--resume keeps a run and --overwrite removes it; pass one of them")
    files = {"model": model, "data": data, "eval_data": eval_data}
    asked = {name: _absolute(value) for name, value in files.items() if value is not None}
    held = existing_run(output)
    if resume:
        spec = _spec_to_resume(held, output, {**asked, **lora, **options})
    else:
        spec = _new_spec(asked, lora, options, demo=demo)
        overwrite = _may_overwrite(held, output, asked=overwrite, demo=demo)
    part_of_batch(spec.options)  # raises before anything is loaded
    console = Console(
        quiet=os.environ.get("RANK", "0") != "0", markup=False, highlight=False, soft_wrap=True
    )
    return _run(spec, output, console, resume=resume, overwrite=overwrite, dry=dry_run)


def _run(
    spec: RunSpec, output: Path, console: Console, *, resume: bool, overwrite: bool, dry: bool
) -> int:
    # transformers, TRL and matplotlib: seconds to import, so only once the flags make sense
    with finetune_imports(), console.status("Loading transformers and TRL"):
        from bridge.peft.finetune import demo, run

    if dry:
        run.dry_run(spec, output, console)
        return 0
    if spec.demo:
        return demo.train_demo(spec, output, console, resume=resume, overwrite=overwrite)
    outcome = run.train(spec, output, console, resume=resume, overwrite=overwrite)
    return run.finish(spec, outcome, output, console)


def _new_spec(
    asked: Mapping[str, str], lora: Mapping[str, Any], options: Mapping[str, Any], *, demo: bool
) -> RunSpec:
    if demo:
        if "eval_data" in asked:
            raise AdapterError("--eval-data needs --model and --data; the demo has its own")
        lora = {**DEMO_LORA, **lora}
        options = {**DEMO_TRAINING, **options}
        asked = {"model": str(base_model_dir()), "data": ""}
    for name, other in (("model", "data"), ("data", "model")):
        if name not in asked:
            raise AdapterError(f"--{other} needs --{name}; leave both out to run the demo")
    if options.get("steps") is not None and options.get("epochs") is not None and not demo:
        raise AdapterError("--steps and --epochs both say when to stop; pass one of them")
    checked = TrainingOptions(**options)
    return RunSpec(
        model=asked["model"],
        data=asked["data"],
        eval_data=asked.get("eval_data"),
        demo=demo,
        lora=LoRA(**lora, seed=checked.seed),
        options=checked,
    )


def _spec_to_resume(held: RunSpec | None, output: Path, asked: Mapping[str, Any]) -> RunSpec:
    if held is None:
        raise AdapterError(f"nothing to resume in {output}; leave --resume out to start a run")
    if is_finished(output):
        raise AdapterError(
            f"nothing to resume: the run in {output} is finished; pass another --output, or "
            "--overwrite instead of --resume"
        )
    if not checkpoints(output):
        raise AdapterError(
            f"nothing to resume: the run in {output} has no complete checkpoint yet; start it "
            "again with --overwrite instead of --resume"
        )
    return continue_spec(held, asked)


def _may_overwrite(held: RunSpec | None, output: Path, *, asked: bool, demo: bool) -> bool:
    """Say whether a run in `output` is to be replaced; a demo replaces a demo without asking."""
    if held is None:
        return False
    if asked or (demo and held.demo):
        return True
    run, resume = "an unfinished run", "--resume to continue it, "
    if is_finished(output):
        run, resume = "a finished run", ""
    raise AdapterError(
        f"{output} holds {run}; pass {resume}--overwrite to replace it, or another --output"
    )


def _absolute(value: str) -> str:
    """A path as the run record keeps it; a Hub id stays as it is."""
    # an empty value, of an unset shell variable say, would be the current directory
    return str(Path(value).resolve()) if value and Path(value).exists() else value
