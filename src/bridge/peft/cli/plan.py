"""`bridge-peft plan`: what a recipe would adapt and what it costs, loading no weights."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from bridge.peft import LoRA
from bridge.peft.cli.flags import takes_fields_of
from bridge.peft.cli.imports import finetune_imports


@takes_fields_of(lora=LoRA, skip={"lora": ["seed"]})
def command(
    model: Annotated[
        str, typer.Option(help="Base model: a directory or a Hub id.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    *,
    lora: dict[str, Any],
) -> None:
    """Show what would be adapted and what it costs: rank, parameters, file and optimizer size.

    The model is built without weights, so a 70B one takes seconds and no memory.

    Example: bridge-peft plan --model ./llama --target-modules q_proj,v_proj --dim 16
    """
    recipe = LoRA(**lora)
    with finetune_imports():  # seconds, so only once the flags make sense
        from bridge.peft.finetune.models import load_config, meta_model

    plan = recipe.plan(meta_model(load_config(model), model))
    print(json.dumps(plan.to_dict(), indent=2) if as_json else plan)
