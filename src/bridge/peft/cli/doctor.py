"""`bridge-peft doctor`: what is wrong with a model, an adapter, or the two together."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from bridge.peft.cli.imports import finetune_imports
from bridge.peft.doctor import doctor
from bridge.peft.errors import AdapterError


def command(
    model: Annotated[
        str | None, typer.Option(help="Base model: a directory or a Hub id.", show_default=False)
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Directory of a PEFT adapter.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check an adapter, a model, or the two together: pass, warn or fail, each with the fix.

    Exit code 0 if no check failed, 1 if one did.

    Example: bridge-peft doctor --model ./llama --adapter runs/demo
    """
    if adapter is None and model is None:
        raise AdapterError("nothing to check; pass --adapter DIR, --model DIR_OR_HUB_ID, or both")
    if adapter is not None and not os.path.isdir(adapter):
        raise AdapterError(f"no such adapter directory: {adapter}")
    base = None
    if model is not None:
        with finetune_imports():  # seconds, so only where a model is asked for
            from bridge.peft.finetune.models import load_config, load_model

        base = load_model(model, getattr(load_config(model), "dtype", None) or torch.float32)
    with warnings.catch_warnings():
        # a row of the table says it, with the fix
        warnings.filterwarnings("ignore", "the base model is not the one that the adapter")
        report = doctor(base, adapter)
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    if not report.healthy:
        raise typer.Exit(1)
