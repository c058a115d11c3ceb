"""`bridge-peft resize`: the same adapter with another rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bridge.peft.formats.peft import read_adapter, write_adapter
from bridge.peft.formats.peft.adapter_file import check_new
from bridge.peft.resize import resize


def command(
    adapter: Annotated[
        Path, typer.Argument(help="Directory of a PEFT adapter.", show_default=False)
    ],
    rank: Annotated[int, typer.Option(help="The new rank of every module.", show_default=False)],
    output: Annotated[
        Path, typer.Option(help="A directory that is new or empty.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Give an adapter another rank and say how much of each update is kept.

    A lower rank takes the nearest update of that rank (truncated SVD); a higher one leaves the
    function as it is and room to train. The scale of every module stays the same.

    Example: bridge-peft resize runs/demo --rank 4 --output runs/demo-4
    """
    check_new(output)
    resized, report = resize(read_adapter(adapter), rank)
    write_adapter(resized, output)
    if as_json:
        print(json.dumps({"output": str(output), **report.to_dict()}, indent=2))
        return
    print(report)
    print(f"\nadapter of rank {rank} in {output}")
