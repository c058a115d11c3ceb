"""`bridge-peft inspect`: what an adapter holds, and how large each module's update is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge.peft.dtypes import dtype_name
from bridge.peft.formats.peft import AdapterFile, read_adapter
from bridge.peft.formats.peft.attention import in_model
from bridge.peft.low_rank import norm
from bridge.peft.model.walk import some_names
from bridge.peft.natural_order import natural_key
from bridge.peft.text_table import table


def command(
    adapter: Annotated[
        Path, typer.Argument(help="Directory of a PEFT adapter.", show_default=False)
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table.", show_default=False)
    ] = False,
) -> None:
    """Show rank, alpha, targets, parameters and the size of each module's update.

    A module whose update is zero is marked as dead: it was never trained, or learned nothing.

    Example: bridge-peft inspect runs/demo
    """
    report = describe(in_model(read_adapter(adapter)))
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print("\n".join(_lines(report)))


def describe(adapter: AdapterFile) -> dict[str, Any]:
    """Return what an adapter holds, ready for JSON.

    `update_norm` is the Frobenius norm of `scale · B A`; a module where it is zero is dead.
    """
    modules = [
        {
            "fqn": fqn,
            "shape": [b.shape[-2], a.shape[-1]],
            "matrices": a.shape[0] if a.dim() == 3 else 1,
            "dim": adapter.rank(fqn),
            "alpha": adapter.alpha(fqn),
            "scale": adapter.scale(fqn),
            "dtype": dtype_name(a.dtype),
            "parameters": a.numel() + b.numel() + (b.shape[0] if adapter.magnitudes else 0),
            "update_norm": (size := abs(adapter.scale(fqn)) * norm(a, b)),
            "dead": size == 0.0,
        }
        for fqn, (a, b) in sorted(adapter.tensors.items(), key=lambda item: natural_key(item[0]))
    ]
    whole = [
        {"name": name, "shape": list(tensor.shape), "parameters": tensor.numel()}
        for name, tensor in sorted(adapter.whole.items(), key=lambda item: natural_key(item[0]))
    ]
    targets = adapter.config.get("target_modules") or []
    return {
        "rank": adapter.parsed.r,
        "alpha": adapter.parsed.lora_alpha,
        "use_rslora": adapter.parsed.use_rslora,
        "use_dora": adapter.parsed.use_dora,
        "dropout": adapter.parsed.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "target_parameters": list(adapter.parsed.target_parameters),
        "base_model": adapter.config.get("base_model_name_or_path"),
        "parameters": sum(module["parameters"] for module in modules),
        "dead_modules": [module["fqn"] for module in modules if module["dead"]],
        "modules": modules,
        "token_rows": [
            {"fqn": fqn, "tokens": list(adapter.token_indices(fqn)), "parameters": rows.numel()}
            for fqn, rows in adapter.tokens.items()
        ],
        "saved_in_full": whole,
    }


def _lines(report: dict[str, Any]) -> list[str]:
    targets = report["target_modules"]
    named = [targets] if isinstance(targets, str) else [*targets, *report["target_parameters"]]
    scaling = ", rank-stabilised" if report["use_rslora"] else ""
    scaling += ", DoRA" if report["use_dora"] else ""
    dead = report["dead_modules"]
    lines = [
        f"rank {report['rank']}, alpha {report['alpha']:g}{scaling}, dropout {report['dropout']:g}",
        f"targets: {', '.join(named)}",
        f"base model: {report['base_model'] or 'not recorded'}",
        "",
        *table(("module", "shape (out×in)", "rank", "scale", "|update|"), _rows(report)),
        "",
        f"{len(report['modules'])} modules, {report['parameters']:,} parameters",
    ]
    for embedding in report["token_rows"]:
        shown = some_names([str(token) for token in embedding["tokens"]])
        lines.append(f"rows of {embedding['fqn']} for the tokens {shown}")
    if whole := report["saved_in_full"]:
        shown = [f"{t['name']} {'×'.join(map(str, t['shape']))}" for t in whole]
        size = sum(tensor["parameters"] for tensor in whole)
        lines.append(f"saved in full, {size:,} parameters: {some_names(shown)}")
    if dead:
        lines.append(
            f"warning: {len(dead)} of {len(report['modules'])} modules are dead: their update is "
            "zero, as before training"
        )
    return lines


def _rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            module["fqn"],
            (f"{module['matrices']} of " if module["matrices"] > 1 else "")
            + f"{module['shape'][0]}×{module['shape'][1]}",
            str(module["dim"]),
            f"{module['scale']:g}",
            f"{module['update_norm']:.3e}" + ("  dead" if module["dead"] else ""),
        )
        for module in report["modules"]
    ]
