"""What a finished run leaves beside the adapter: `metrics.json`, `loss.png`, a summary."""

from __future__ import annotations

import platform
import resource
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bridge.peft.dtypes import dtype_name
from bridge.peft.finetune.prepare import Prepared
from bridge.peft.finetune.trainer import AdapterTrainer
from bridge.peft.version import __version__

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "safetensors")
_SMOOTHED_POINTS = 20
#: How transformers is told to quantise a base as `--quantize` does.
_IN_PYTHON = {
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
    "int8": "load_in_8bit=True",
}


def run_metrics(
    trainer: AdapterTrainer, prepared: Prepared, output: Path, *, seconds: float
) -> dict[str, Any]:
    """Return losses, speed and sizes; a resumed run's speed is that of the steps since.

    This process trained and evaluated for `seconds`; the speed leaves evaluation out.
    """
    state, before = trainer.state, trainer.before
    _, losses = loss_points(state.log_history, "loss")
    _, evaluations = loss_points(state.log_history, "eval_loss")
    since = state.log_history[len(before.log_history) :]
    evaluation_seconds = sum(row.get("eval_runtime", 0.0) for row in since)
    # counted over all processes, of which those of a tensor parallel model see the same ones
    seen_by = trainer.args.world_size // trainer.parts
    tokens = int(state.num_input_tokens_seen - before.num_input_tokens_seen) // seen_by
    plan = prepared.plan
    return {
        "eval_loss_before": evaluations[0] if evaluations else None,
        "eval_loss_after": evaluations[-1] if evaluations else None,
        "train_loss": losses[-1],
        "steps": state.global_step,
        "resumed_from_step": before.global_step,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / max(seconds - evaluation_seconds, 1e-9),
        "train_samples": len(prepared.train),
        "eval_samples": len(prepared.evaluation),
        "trainable_parameters": plan.trainable,
        "model_parameters": plan.base_parameters + plan.trainable,
        "adapter_bytes": (output / "adapter_model.safetensors").stat().st_size,
        "peak_memory_bytes": peak_memory_bytes(),
        "dtype": dtype_name(prepared.dtype),
        "device": str(trainer.args.device),
        "processes": trainer.args.world_size,
        "seed": trainer.args.seed,
        "versions": {
            "python": platform.python_version(),
            "bridge-peft": __version__,
            **{package: version(package) for package in _PACKAGES},
        },
    }


def loss_points(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one quantity in a trainer's log history."""
    points = [(row["step"], row[key]) for row in history if key in row]
    return [step for step, _ in points], [value for _, value in points]


def peak_memory_bytes() -> int:
    """Return the most memory this process held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plot_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Draw training and evaluation loss over the steps."""
    steps, losses = loss_points(history, "loss")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    smooth = smoothed(losses)
    axes.plot(steps, losses, color="C0", alpha=0.3 if smooth else 1.0, label="training")
    if smooth:
        axes.plot(steps, smooth, color="C0", label="training, smoothed")
    eval_steps, eval_losses = loss_points(history, "eval_loss")
    if eval_steps:
        axes.plot(eval_steps, eval_losses, "o-", color="C1", markersize=4, label="evaluation")
    axes.set(xlabel="step", ylabel="loss per token", title=path.resolve().parent.name)
    axes.set_xlim(left=0)
    if min(losses + eval_losses) < 0.5 * max(losses + eval_losses):
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def print_summary(console: Console, output: Path, metrics: dict[str, Any], model: str) -> None:
    """Print the figures of a finished run and what to do next."""
    table = Table(title=f"Adapter in {output}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    for name, value in _summary_rows(metrics):
        table.add_row(name, value)
    console.print(table)
    here, base = shlex.quote(str(output)), shlex.quote(model)
    console.print("What next:", style="bold")
    console.print(f"  bridge-peft inspect {here}")
    kind = metrics.get("quantize")
    merge = f"  bridge-peft merge --model {base} --adapter {here} --output {here}-merged"
    console.print(merge + (f" --quantize {kind}" if kind else ""))
    console.print(f"  tensorboard --logdir {here}/logs")
    console.print("In Python, with PEFT:", style="bold")
    if kind:
        console.print(f"  how = transformers.BitsAndBytesConfig({_IN_PYTHON[kind]})")
    how = ", quantization_config=how" if kind else ""
    console.print(f'  base = transformers.AutoModelForCausalLM.from_pretrained("{model}"{how})')
    console.print(f'  model = peft.PeftModel.from_pretrained(base, "{output}")')


def _summary_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    before, after = metrics["eval_loss_before"], metrics["eval_loss_after"]
    evaluation = "not measured" if after is None else f"{before:.4f} -> {after:.4f}"
    share = metrics["trainable_parameters"] / metrics["model_parameters"]
    resumed = metrics["resumed_from_step"]
    steps = f"{metrics['steps']}" + (f" (resumed from step {resumed})" if resumed else "")
    rows = [
        ("evaluation loss", evaluation),
        ("training loss, last logged", f"{metrics['train_loss']:.4f}"),
        ("steps", steps),
        ("time", f"{metrics['seconds']:.1f} s, {metrics['tokens_per_second']:,.0f} tokens/s"),
        ("trained", f"{metrics['trainable_parameters']:,} parameters, {share:.2%} of the model"),
        ("adapter file", f"{metrics['adapter_bytes'] / 1e6:.2f} MB"),
        ("peak memory", f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB"),
        ("loss curve", "loss.png"),
    ]
    if kind := metrics.get("quantize"):
        now, dense = metrics["base_bytes"], metrics["dense_base_bytes"]
        told = f"{now / 1e6:.1f} MB in {kind}, {(dense - now) / 1e6:.1f} MB saved"
        rows.insert(-1, ("base model", f"{told} over {metrics['dtype']}"))
    return rows


def smoothed(values: list[float]) -> list[float]:
    """Mean over a window around each point, narrower at the ends; empty for a short curve."""
    if len(values) < _SMOOTHED_POINTS:
        return []
    half, last = len(values) // _SMOOTHED_POINTS, len(values) - 1
    # as far on both sides, so that a slope is not shifted
    reaches = [min(half, i, last - i) for i in range(len(values))]
    return [fmean(values[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]
