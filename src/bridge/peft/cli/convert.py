"""`bridge-peft convert`: an adapter in another tool's format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from bridge.peft.errors import AdapterError
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
        typer.Option(help="Directory of the base model; only its config.json is read."),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads, without --model.")] = None,
    query_groups: Annotated[
        int | None, typer.Option(help="Key and value heads, without --model.")
    ] = None,
    head_dim: Annotated[int | None, typer.Option(help="Size of a head, without --model.")] = None,
    interleaved: Annotated[
        bool,
        typer.Option(
            help="Without --model: torchtune interleaves the rotary halves (Llama yes, Qwen no)."
        ),
    ] = True,
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
    """Convert an adapter between PEFT, Megatron and torchtune, and say how each module came about.

    A Megatron or torchtune directory keeps the PEFT config beside the tensors, so the way back
    gives the same files.

    Example: bridge-peft convert runs/demo --to megatron --model ./llama --output runs/megatron
    """
    layout = _layout(model, heads, query_groups, head_dim, interleaved)
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


def _layout(
    model: Path | None,
    heads: int | None,
    groups: int | None,
    head_dim: int | None,
    interleaved: bool,
) -> AttentionLayout | None:
    if model is not None:
        return AttentionLayout.of_model(model)
    if heads is None and groups is None and head_dim is None:
        return None
    if heads is None or head_dim is None:
        raise AdapterError("--heads and --head-dim go together; or pass --model")
    return AttentionLayout(
        heads=heads, groups=groups or heads, head_dim=head_dim, interleaved=interleaved
    )


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
    lines += ["", f"{done.source} -> {done.target}{recipe}: {output}"]
    return lines
