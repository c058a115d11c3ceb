"""`bridge-peft convert`: an adapter in another tool's format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from bridge.peft.formats.convert.adapters import TARGETS, Conversion, convert_adapter
from bridge.peft.formats.convert.layout import AttentionLayout
from bridge.peft.text_table import table


def command(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="An adapter's directory, or its safetensors file; the format is detected.",
            show_default=False,
        ),
    ],
    to: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.", show_default=False)],
    output: Annotated[
        Path, typer.Option(help="A directory that is new or empty.", show_default=False)
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the base model, or its config.json, for the number of heads; "
            "default: the base that the adapter names.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Alpha of a file that comes without a config.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="megatron: approximate what needs more than this rank; default: exact."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table.", show_default=False)
    ] = False,
) -> None:
    """Convert an adapter between PEFT, Megatron, torchtune and mlx_lm, and say how, by module.

    A directory in another format than PEFT's keeps the PEFT config beside the tensors, so the way
    back gives the same files.

    Example: bridge-peft convert runs/demo --to megatron --output runs/megatron
    """
    layout = None if model is None else AttentionLayout.of_model(model)
    done = convert_adapter(adapter, to, output, layout=layout, alpha=alpha, rank=rank)
    if as_json:
        print(json.dumps(to_dict(done), indent=2))
        return
    print("\n".join(_lines(done, output)))


def to_dict(done: Conversion) -> dict[str, object]:
    """A conversion, ready for JSON."""
    steps = [{"name": s.name, "how": s.how, "relative_error": s.error} for s in done.steps]
    return {
        "source": done.source,
        "target": done.target,
        "dim": done.dim,
        "alpha": done.alpha,
        "modules": steps,
    }


def _lines(done: Conversion, output: Path) -> list[str]:
    groups: dict[tuple[str, str], list[float]] = {}
    for step in done.steps:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", step.name)
        groups.setdefault((name, step.how), []).append(step.error)
    rows = [
        (f"{name} ×{len(errors)}", how, f"{max(errors):.1e}" if max(errors) else "exact")
        for (name, how), errors in groups.items()
    ]
    lines = list(table(("module", "how", "relative error"), rows))
    recipe = "" if done.dim is None else f", dim={done.dim} alpha={done.alpha:g} for all modules"
    if done.base:
        lines += ["", f"heads: as in {done.base}, which the adapter names as its base"]
    lines += ["", f"{done.source} -> {done.target}{recipe}: {output}"]
    return lines
