"""`bridge-peft plan`: what a recipe would adapt and what it costs, loading no weights."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from bridge.peft import LoRA
from bridge.peft.cli.flags import takes_fields_of
from bridge.peft.cli.imports import finetune_imports
from bridge.peft.dtypes import parse_dtype
from bridge.peft.errors import AdapterError
from bridge.peft.scaling import Layout, per_rank


@takes_fields_of(lora=LoRA, layout=Layout, skip={"lora": ["seed"]})
def command(
    model: Annotated[
        str, typer.Option(help="Base model: a directory or a Hub id.", show_default=False)
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the base's weights (default: its own).", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    *,
    lora: dict[str, Any],
    layout: dict[str, Any],
) -> None:
    """Show what would be adapted and what it costs: rank, parameters, file and optimizer size.

    The model is built without weights, so a 70B one takes seconds and no memory. With --world it
    adds what each rank of a distributed run holds and communicates.

    Example: bridge-peft plan --model ./llama --target-modules q_proj,v_proj --dim 16
    """
    recipe, ranks = LoRA(**lora), _layout(layout)
    base_dtype = None if dtype is None else parse_dtype(dtype)
    with finetune_imports():  # seconds, so only once the flags make sense
        from bridge.peft.finetune.models import load_config, meta_model

    base = meta_model(load_config(model), model, base_dtype)
    plan = recipe.plan(base)
    cost = None if ranks is None else per_rank(plan, base, ranks)
    if as_json:
        extra = {} if cost is None else {"ranks": cost.to_dict()}
        print(json.dumps(plan.to_dict() | extra, indent=2))
    else:
        print(plan if cost is None else f"{plan}\n\n{cost}")


def _layout(given: dict[str, Any]) -> Layout | None:
    """The layout that the flags say, None where there are none."""
    if not given:
        return None
    for name in ("world", "tokens"):
        if name not in given:
            raise AdapterError(f"--{next(iter(given)).replace('_', '-')} needs --{name} too")
    return Layout(**given)
