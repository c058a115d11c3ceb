"""`bridge-peft merge`: fold adapters into a model directory, without loading the model."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as Speed

from bridge.peft.dtypes import parse_dtype
from bridge.peft.errors import AdapterError
from bridge.peft.merging.directory import merge_directory
from bridge.peft.merging.directory.merge import Progress as Report
from bridge.peft.merging.directory.quantised import QUANTISE

#: A merge that takes no longer than this shows no progress bar.
_QUIET_SECONDS = 2.0


def command(
    model: Annotated[Path, typer.Option(help="Directory of the base model.", show_default=False)],
    adapter: Annotated[
        list[str],
        typer.Option(
            help="Directory of a PEFT adapter, or DIR:weight; several are summed.",
            metavar="DIR[:WEIGHT]",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Directory to create for the merged model.", show_default=False)
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the merged model; default: the base's.", show_default=False),
    ] = None,
    compute_dtype: Annotated[
        str, typer.Option(help="Dtype of the computation: float32 or float64.")
    ] = "float32",
    untie: Annotated[
        bool, typer.Option("--untie", help="Give an adapted tied head weights of its own.")
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="How the base was quantised in training: its weights are dequantised from that; "
            "none takes the base's as they are.",
            metavar="|".join(QUANTISE),
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write W + weight · scale · B A as a model directory that plain transformers loads.

    The model is streamed: memory stays below the size of its largest file. After an interruption
    the same command continues where the last one stopped.

    Example: bridge-peft merge --model ./llama --adapter runs/demo --output ./merged
    """
    adapters = [parse_adapter(word) for word in adapter]
    try:
        with _progress_bar() as progress:
            report = merge_directory(
                model,
                adapters,
                output,
                dtype=None if dtype is None else parse_dtype(dtype),
                compute_dtype=parse_dtype(compute_dtype),
                untie=untie,
                quantize=quantize,
                progress=progress,
            )
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this one stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps({"output": str(output), **report.to_dict()}, indent=2))
        return
    print(report)
    print(f"\nmerged model in {output}")


def parse_adapter(word: str) -> tuple[Path, float]:
    """Take `DIR:weight` apart; without a weight it is 1.

    Args:
        word: What follows `--adapter`.

    Raises:
        AdapterError: The weight is not finite.
    """
    directory, colon, number = word.rpartition(":")
    try:
        weight = float(number) if colon and directory else None
    except ValueError:
        weight = None  # a colon in the directory's name
    if weight is None or os.path.isdir(word):
        return Path(word), 1.0
    if not math.isfinite(weight):
        raise AdapterError(f"the weight in {word!r} must be finite; write e.g. {directory}:0.5")
    return Path(directory), weight


@contextmanager
def _progress_bar() -> Iterator[Report]:
    """Yield what shows the progress on a terminal, once a merge takes more than two seconds."""
    console = Console(file=sys.stderr)
    columns = (BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
    bar = Progress("merging", *columns, console=console, transient=True)
    task = bar.add_task("merging", total=None)
    started = time.monotonic()

    def show(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if console.is_terminal and time.monotonic() - started > _QUIET_SECONDS:
            bar.start()

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
