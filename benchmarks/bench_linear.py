"""One LoRA linear, forward and backward, against the frozen base and against its peers.

Every layer is timed once a round in random order, in one process; a cell's figure is the median
over rounds of its time over the frozen base's time of the same round.

    python benchmarks/bench_linear.py [--quick] [--dtypes float32] [--dropouts 0 0.1]

writes linear.csv, linear.md and linear.png to benchmarks/results (linear_quick.* with --quick,
linear_mixed.* with --mixed: float32 A and B over a bfloat16 base).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from measure import machine, median_ratio, paired_times, peak_bytes, saved_bytes, step
from peers import MIXED, Case, available

Builders = Mapping[str, Callable[[Case], nn.Module]]
RESULTS = Path(__file__).parent / "results"
CPU_SHAPES = [(512, 1024, 1024), (2048, 1024, 1024), (1024, 2048, 2048), (2048, 2048, 5632)]
#: What we aim at over all CPU shapes and ranks, by dtype and dropout.
TARGETS = {
    ("float32", 0.0): 1.11,
    ("float32", 0.1): 1.28,
    ("bfloat16", 0.0): 1.08,
    ("bfloat16", 0.1): 1.18,
}
CUDA_SHAPES = [(t, n, n) for n in (4096, 5120, 8192) for t in (2048, 4096, 8192)]


def cases(args: argparse.Namespace) -> list[Case]:
    """The cells of the grid, for this device and these arguments."""
    cuda = torch.cuda.is_available()
    dtypes: list[str] = ["bfloat16"] if cuda else args.dtypes
    shapes, dims = (CUDA_SHAPES, [16]) if cuda else (CPU_SHAPES, [8, 16, 64])
    if args.quick:
        shapes, dims = shapes[:2], [16]
    return [
        Case(tokens, k, n, dim, p, getattr(torch, dtype), "cuda" if cuda else "cpu")
        for dtype in dtypes
        for p in args.dropouts
        for tokens, k, n in shapes
        for dim in dims
    ]


def measure(case: Case, builders: Builders, budget: float) -> list[dict[str, Any]]:
    """Time, saved bytes and peak memory of every layer in one cell."""
    layers = {name: build(case) for name, build in builders.items()}
    x, dy = case.tensors()
    runs = {name: lambda layer=layer: step(layer, x, dy) for name, layer in layers.items()}
    times, disturbed = paired_times(runs, budget)
    rows = []
    for name, layer in layers.items():
        cell = dataclasses.asdict(case) | {"dtype": str(case.dtype).removeprefix("torch.")}
        rows.append(
            cell
            | {
                "layer": name,
                "rounds": len(times[name]),
                "disturbed": disturbed,
                "milliseconds": round(1e3 * statistics.median(times[name]), 3),
                "ratio": round(median_ratio(times[name], times["frozen"]), 4),
                "floor": round(case.floor, 4),
                "saved_bytes": saved_bytes(layer, x),
                "peak_bytes": peak_bytes(layer, x, dy),
                "machine": machine(),
                "torch": torch.__version__,
            }
        )
    return rows


def geometric_mean(values: list[float]) -> float:
    """The n-th root of the product."""
    return math.exp(statistics.fmean(map(math.log, values)))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of geometric means, and one of all cells."""
    names = [name for name in available() if name != "frozen"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["dropout"]), []).append(row)
    lines = [
        f"Machine: {rows[0]['machine']}; torch {rows[0]['torch']}. Time of forward and backward "
        "over the frozen base's, medians of pairs.",
        "",
        f"| geometric mean | floor | {' | '.join(names)} | target for ours | worst cell of ours "
        "over the best peer |",
        "|---" * (len(names) + 4) + "|",
    ]
    for (dtype, p), group in groups.items():
        cells = _by_cell(group)
        means = [geometric_mean([c[n]["ratio"] for c in cells.values()]) for n in names]
        floor = geometric_mean([c["ours"]["floor"] for c in cells.values()])
        worst = max(
            c["ours"]["ratio"] / min(c[n]["ratio"] for n in names if n != "ours")
            for c in cells.values()
        )
        figures = " | ".join(f"{m:.3f}" for m in means)
        target = _target(dtype, float(p), means[names.index("ours")], len(cells))
        lines.append(f"| {dtype}, p={p} | {floor:.3f} | {figures} | {target} | {worst:.3f} |")
    if any("missed" in line for line in lines):
        lines += ["", "Where the time above the floor goes: profile.md (`bench_profile.py`)."]
    return "\n".join([*lines, "", *_cell_table(rows, names)]) + "\n"


def _target(dtype: str, p: float, mean: float, cells: int) -> str:
    """The target of a row and whether it is met; a dash where the grid is not the whole one."""
    target = TARGETS.get((dtype, p))
    if target is None or cells != 3 * len(CPU_SHAPES) or torch.cuda.is_available():
        return "–"
    return f"{target:.2f}, {'met' if mean <= target else f'missed by {mean - target:.3f}'}"


def _by_cell(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    keys = ("dtype", "dropout", "tokens", "in_features", "out_features", "dim")
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(tuple(row[k] for k in keys), {})[row["layer"]] = row
    return cells


def _cell_table(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    peer = "peft" if "peft" in names else "seed"
    lines = [
        f"| cell | frozen ms | floor | {' | '.join(names)} | saved MB ours / {peer} "
        f"| peak MB frozen / ours / {peer} |",
        "|---" * (len(names) + 5) + "|",
    ]
    for (dtype, p, tokens, k, n, dim), cell in _by_cell(rows).items():
        figures = " | ".join(f"{cell[name]['ratio']:.3f}" for name in names)
        saved = " / ".join(f"{cell[name]['saved_bytes'] / 1e6:.2f}" for name in ("ours", peer))
        peak = (f"{cell[name]['peak_bytes'] / 1e6:.1f}" for name in ("frozen", "ours", peer))
        lines.append(
            f"| {dtype} p={p} {tokens}, {k}×{n}, r{dim} | {cell['frozen']['milliseconds']:.1f} "
            f"| {cell['ours']['floor']:.3f} | {figures} | {saved} | {' / '.join(peak)} |"
        )
    return lines


def mixed_markdown(rows: list[dict[str, Any]]) -> str:
    """What float32 A and B cost over a 16-bit base."""
    lines = [
        f"Machine: {rows[0]['machine']}; torch {rows[0]['torch']}. Time of forward and backward "
        "over the frozen bfloat16 base's, medians of pairs. Targets: float32 A and B at most 1.05 "
        "of bfloat16 ones, and never more than PEFT's.",
        "",
        "| cell | ours, float32 A and B | ours, 16 bits | PEFT, float32 | float32 / 16 bits |",
        "|---|---|---|---|---|",
    ]
    over, worst = [], 0.0
    for (_, p, tokens, k, n, dim), cell in _by_cell(rows).items():
        ratios = {name: row["ratio"] for name, row in cell.items()}
        over.append(ratios["ours"] / ratios["ours, 16 bits"])
        worst = max(worst, ratios["ours"] / ratios["peft"])
        figures = (ratios["ours"], ratios["ours, 16 bits"], ratios["peft"], over[-1])
        shown = " | ".join(f"{figure:.3f}" for figure in figures)
        lines.append(f"| p={p} {tokens}, {k}×{n}, r{dim} | {shown} |")
    mean = geometric_mean(over)
    verdicts = "met" if mean <= 1.05 else "missed", "met" if worst <= 1 else "missed"
    return "\n".join(
        [
            *lines,
            "",
            f"float32 over 16 bits: {mean:.3f} (geometric mean), {verdicts[0]}; worst cell over "
            f"PEFT's: {worst:.3f}, {verdicts[1]}.",
            "",
        ]
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratio of every layer in every cell, with the FLOP floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["dropout"]), []).append(row)
    figure, axes = plt.subplots(len(groups), 1, figsize=(11, 3.2 * len(groups)), squeeze=False)
    for axis, ((dtype, p), group) in zip(axes[:, 0], groups.items(), strict=True):
        cells = _by_cell(group)
        labels = [f"{c[2]}\n{c[3]}×{c[4]}\nr{c[5]}" for c in cells]
        for name in available():
            if name != "frozen":
                style = "o-" if name == "ours" else "x:"
                axis.plot(labels, [c[name]["ratio"] for c in cells.values()], style, label=name)
        axis.plot(labels, [c["ours"]["floor"] for c in cells.values()], "k_", ms=16, label="floor")
        axis.set(title=f"{dtype}, dropout {p}", ylabel="time / frozen base")
        axis.grid(axis="y", alpha=0.3)
        axis.legend(ncols=6, fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file written here."""
    with path.open() as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        for key in ("ratio", "floor", "milliseconds", "saved_bytes", "peak_bytes"):
            row[key] = float(row[key])
    return rows


def main() -> None:
    """Measure the grid and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes at rank 16")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--budget", type=float, default=None, help="seconds a cell, about")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mixed", action="store_true", help="float32 A and B over bfloat16 only")
    parser.add_argument("--append", action="store_true", help="add to the CSV there is")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.mixed:
        args.dtypes = ["bfloat16"]
    builders = MIXED if args.mixed else available()
    name = (
        "linear"
        + "_mixed" * args.mixed
        + ("_cuda" if torch.cuda.is_available() else "")
        + "_quick" * args.quick
    )
    RESULTS.mkdir(exist_ok=True)
    table = RESULTS / f"{name}.csv"
    rows: list[dict[str, Any]] = []
    for case in cases(args):
        found = measure(case, builders, args.budget or (4.0 if args.quick else 6.0))
        rows += found
        ratios = "  ".join(f"{r['layer']} {r['ratio']:.3f}" for r in found)
        print(f"{case}\n  {ratios}  ({found[0]['disturbed']} rounds disturbed)", flush=True)
    append = args.append and table.exists()
    with table.open("a" if append else "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if not append:
            writer.writeheader()
        writer.writerows(rows)
    rows = read(table)
    text = mixed_markdown(rows) if args.mixed else markdown(rows)
    (RESULTS / f"{name}.md").write_text(text)
    if not args.mixed:
        plot(rows, RESULTS / f"{name}.png")
    print("\n" + text)


if __name__ == "__main__":
    main()
