"""Functions and kinds of bases beside PEFT: one training step over the frozen base's.

Each case is a function that gives steps by name, `frozen` among them; `@case` puts it into the
table. Every step is timed once a round in random order, in one process; a figure is the median over
rounds of a step's time over the frozen one's of the same round.

    python benchmarks/bench_kinds.py [--quick] [--only dora]

writes kinds.csv and kinds.md to benchmarks/results (kinds_quick.* with --quick).
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bridge.peft import LoRA
from measure import machine, median_ratio, paired_times, step, write_csv
from peers import Case

RESULTS = Path(__file__).parent / "results"
#: A step of each layer or model that is compared; `frozen` is what the others are divided by.
Steps = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Kind:
    """One row of the table.

    Attributes:
        name: What is compared.
        goal: What the ratio of `ours` is to be at most, or None.
        build: Makes the steps; of smaller sizes where it is told to be quick.
    """

    name: str
    goal: float | None
    build: Callable[[bool], Steps]


KINDS: list[Kind] = []


def case(name: str, goal: float | None = None) -> Callable[[Callable[[bool], Steps]], None]:
    """Put a function into the table."""
    return lambda build: KINDS.append(Kind(name, goal, build))


def dora_steps(quick: bool, dropout: float) -> Steps:
    """DoRA on 2048 tokens, 1024², rank 16, float32; our plain LoRA beside it."""
    shape = Case(512 if quick else 2048, 1024, 1024, 16, dropout, torch.float32)
    x, dy = shape.tensors()
    layers = {
        "frozen": shape.base(),
        "ours": _ours(shape, use_dora=True),
        "peft": _peft(shape, use_dora=True),
        "our LoRA": _ours(shape, use_dora=False),
    }
    return {name: lambda layer=layer: step(layer, x, dy) for name, layer in layers.items()}


case("dora", goal=1.25)(lambda quick: dora_steps(quick, 0.0))
case("dora, dropout 0.1")(lambda quick: dora_steps(quick, 0.1))


def _ours(shape: Case, *, use_dora: bool) -> nn.Module:
    recipe = LoRA(dim=shape.dim, alpha=shape.alpha, dropout=shape.dropout, use_dora=use_dora)
    layer = recipe(nn.Sequential(shape.base()))[0]
    nn.init.normal_(layer.get_parameter("lora_b.weight"), std=0.02)
    return layer


def _peft(shape: Case, *, use_dora: bool) -> nn.Module:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(
        r=shape.dim, lora_alpha=shape.alpha, lora_dropout=shape.dropout, use_dora=use_dora
    )
    layer = Linear(shape.base(), "default", config, r=shape.dim, lora_alpha=shape.alpha)
    nn.init.normal_(layer.get_parameter("lora_B.default.weight"), std=0.02)
    return layer


def quantised_steps(make: Callable[[Case], Any], quick: bool) -> Steps:
    """A branch on a quantised linear: 2048 tokens, 1024², rank 16, x in float32."""
    shape = Case(512 if quick else 2048, 1024, 1024, 16, 0.0, torch.float32)
    x, dy = shape.tensors()
    ours = LoRA(dim=shape.dim, alpha=shape.alpha)(nn.Sequential(make(shape)))[0]
    nn.init.normal_(ours.get_parameter("lora_b.weight"), std=0.02)
    layers = {"frozen": make(shape), "ours": ours, "peft": _quantised_by_peft(make(shape), shape)}
    return {name: lambda layer=layer: step(layer, x, dy) for name, layer in layers.items()}


def _nf4(shape: Case) -> Any:
    from bitsandbytes.nn.modules import Linear4bit

    layer = Linear4bit(
        *(shape.in_features, shape.out_features),
        bias=False,
        compute_dtype=shape.dtype,
        quant_type="nf4",
    )
    layer.load_state_dict(shape.base().state_dict())
    layer.support_avx512bf16_for_cpu = False  # the layout for inference has no backward
    return layer.to("cpu")


def _int8(shape: Case) -> Any:
    from bitsandbytes.nn.modules import Linear8bitLt

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each cast of x
    layer = Linear8bitLt(shape.in_features, shape.out_features, bias=False, has_fp16_weights=False)
    layer.load_state_dict(shape.base().state_dict())
    return layer.to("cpu")


def _torchao_int8(shape: Case) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(shape.base())
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


def _quantised_by_peft(base: nn.Linear, shape: Case) -> nn.Module:
    import peft

    model: Any = nn.Sequential(base)
    kind = type(base.weight).__name__
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "Params4bit", kind == "Int8Params"
    config = peft.LoraConfig(r=shape.dim, lora_alpha=shape.alpha, target_modules=["0"])
    adapted: Any = peft.get_peft_model(model, config)
    layer = adapted.base_model.model[0]
    nn.init.normal_(layer.get_parameter("lora_B.default.weight"), std=0.02)
    return layer


case("quantised, bitsandbytes nf4")(lambda quick: quantised_steps(_nf4, quick))
case("quantised, bitsandbytes int8")(lambda quick: quantised_steps(_int8, quick))
case("quantised, torchao int8")(lambda quick: quantised_steps(_torchao_int8, quick))


def measure(kind: Kind, *, quick: bool, budget: float) -> list[dict[str, Any]]:
    """Time every step of one case."""
    steps = kind.build(quick)
    times, disturbed = paired_times(steps, budget)
    return [
        {
            "case": kind.name,
            "who": who,
            "goal": kind.goal if who == "ours" else None,
            "rounds": len(times[who]),
            "disturbed": disturbed,
            "milliseconds": round(1e3 * statistics.median(times[who]), 3),
            "ratio": round(median_ratio(times[who], times["frozen"]), 4),
            "machine": machine(),
            "torch": torch.__version__,
        }
        for who in steps
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line a case."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["who"]] = row
    lines = [
        f"Machine: {rows[0]['machine']}; torch {rows[0]['torch']}. Time of a training step over "
        "the frozen base's, medians of pairs.",
        "",
        "| case | frozen ms | ours | PEFT | others | goal |",
        "|---|---|---|---|---|---|",
    ]
    for name, who in cases.items():
        ratio = {n: f"{row['ratio']:.3f}" for n, row in who.items()}
        others = ", ".join(f"{n} {r}" for n, r in ratio.items() if n not in _COLUMNS) or "–"
        lines.append(
            f"| {name} | {who['frozen']['milliseconds']:.1f} | {ratio['ours']} "
            f"| {ratio.get('peft', '–')} | {others} | {_goal(who['ours'])} |"
        )
    return "\n".join([*lines, ""])


_COLUMNS = ("frozen", "ours", "peft")


def _goal(row: dict[str, Any]) -> str:
    goal = row["goal"]
    if goal is None:
        return "–"
    over = row["ratio"] - goal
    return f"{goal:.2f}, {'met' if over <= 0 else f'missed by {over:.3f}'}"


def main() -> None:
    """Measure the cases and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--budget", type=float, default=None, help="seconds a case, about")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        if kind.name.startswith(args.only):
            budget = args.budget or (1.0 if args.quick else 8.0)
            rows += measure(kind, quick=args.quick, budget=budget)
    RESULTS.mkdir(exist_ok=True)
    name = "kinds" + "_quick" * args.quick
    write_csv(RESULTS / f"{name}.csv", rows)
    (RESULTS / f"{name}.md").write_text(text := markdown(rows))
    print(text)


if __name__ == "__main__":
    main()
