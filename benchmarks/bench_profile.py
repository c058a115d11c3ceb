"""Where the time of a LoRA linear goes: the profile behind the ratios of `bench_linear.py`.

Each cell's step (forward and backward) is timed, and run once more under torch's profiler for its
operators. The branch's six narrow products are told apart by their order; a product at the speed of
the base's GEMMs would take its share of the FLOP floor, which stands beside its time. What is left
of the step is the rest: Python, autograd, memory, caches that the branch has changed. The products
are also timed alone, again and again, with everything in cache: what the step would cost if nothing
but they stood above the frozen layer.

    python benchmarks/bench_profile.py [--quick]

writes profile.csv, profile.md and profile.png to benchmarks/results (profile_quick.* with --quick).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench_linear import CPU_SHAPES, geometric_mean
from bridge.peft.ops.products import contract, contract_backward, expand_, expand_backward
from measure import machine, seconds, step, write_csv
from peers import Case, available

RESULTS = Path(__file__).parent / "results"
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")
#: The products of a step of ours in the order in which they run.
_ORDER = ("h = x Aᵀ", "base y", "y += h Bᵀ", "dh = dy B", "dB", "base dx", "dx += dh A", "dA")
_BASE = ("base y", "base dx")
_MASK, _REST = "mask", "rest"
_MASKING = [f"aten::{op}_" for op in ("bitwise_xor", "mul", "ge", "random", "copy", "add")]
_MASKING += ["aten::addcmul", "aten::cat"]


def operators(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Any]:
    """The profiler's events of one step."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step(layer, x, dy)
    return list(recorded.events() or [])


def parts(events: list[Any], dim: int) -> dict[str, float]:
    """Milliseconds of the products of a step of ours, and of what else computes: the mask's."""
    products = [e for e in events if e.name in _PRODUCTS]
    found: dict[str, float] = dict(zip(_ORDER, _by_order(products, dim), strict=True))
    found[_MASK] = sum(e.self_cpu_time_total / 1e3 for e in events if e.name in _MASKING)
    return found


def alone(case: Case, x: Tensor, dy: Tensor, repeats: int = 15) -> float:
    """Milliseconds of the six narrow products, each repeated with its operands in cache."""
    rows, dy = x.detach().flatten(0, -2), dy.flatten(0, -2)
    a = torch.randn(case.dim, case.in_features).to(case.dtype)
    b = torch.randn(case.out_features, case.dim).to(case.dtype).t()
    h = contract(rows, a, None)
    dh, y, dx = expand_backward(dy, h, b, 1.0, None)[0], dy.clone(), rows.clone()
    runs: tuple[Callable[[], object], ...] = (
        lambda: contract(rows, a, None),
        lambda: expand_(y, h, b, 1e-3, None),
        lambda: expand_backward(dy, h, b, 1.0, None),
        lambda: contract_backward(rows, dh, a, 1e-3, None, dx),
    )
    with torch.no_grad():
        return sum(1e3 * statistics.median(seconds(run) for _ in range(repeats)) for run in runs)


def _by_order(products: list[Any], dim: int) -> list[float]:
    """Milliseconds of the eight products of `_ORDER`, each summed over its blocks of rows.

    Before the base's first GEMM stand the blocks of h, between its two y, then pairs of dh and dB,
    and behind the second pairs of dx and dA.
    """
    first, second = (
        i for i, e in enumerate(products) if not any(dim in shape for shape in e.input_shapes)
    )
    ms = [e.self_cpu_time_total / 1e3 for e in products]
    between, behind = ms[first + 1 : second], ms[second + 1 :]
    return [
        sum(ms[:first]),
        ms[first],
        between[0],
        sum(between[1::2]),
        sum(between[2::2]),
        ms[second],
        sum(behind[0::2]),
        sum(behind[1::2]),
    ]


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Median times of the parts of one cell, each with the time its FLOPs would take."""
    layers = {name: available()[name](case) for name in ("frozen", "ours")}
    x, dy = case.tensors()
    for layer in layers.values():
        for _ in range(3):
            step(layer, x, dy)
    frozen, ours, found = [], [], []
    for _ in range(rounds):
        frozen.append(1e3 * seconds(lambda: step(layers["frozen"], x, dy)))
        ours.append(1e3 * seconds(lambda: step(layers["ours"], x, dy)))
        found.append(parts(operators(layers["ours"], x, dy), case.dim))
    base, total = statistics.median(frozen), statistics.median(ours)
    hot = alone(case, x, dy)
    medians = {part: statistics.median(f[part] for f in found) for part in found[0]}
    medians[_REST] = total - sum(medians.values())
    k, n, r = case.in_features, case.out_features, case.dim
    # the base's 4 N k n take `base`; the branch's products take 2 N k r or 2 N n r each
    share = {name: base * r / (2 * n) for name in ("h = x Aᵀ", "dx += dh A", "dA")}
    share |= {name: base * r / (2 * k) for name in ("y += h Bᵀ", "dh = dy B", "dB")}
    rows = []
    for part, ms in medians.items():
        rows.append(
            {
                "dtype": str(case.dtype).removeprefix("torch."),
                "dropout": case.dropout,
                "tokens": case.tokens,
                "in_features": k,
                "out_features": n,
                "dim": r,
                "part": part,
                "milliseconds": round(ms, 4),
                "at_the_speed_of_the_base": round(share.get(part, 0.0), 4),
                "of_the_frozen_step": round(ms / base, 4),
                "frozen_milliseconds": round(base, 3),
                "ours_milliseconds": round(total, 3),
                "products_alone_milliseconds": round(hot, 3),
                "machine": machine(),
                "torch": torch.__version__,
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line per cell: each part in percent of the frozen step, the FLOPs' part in brackets."""
    names = [name for name in dict.fromkeys(r["part"] for r in rows) if name not in _BASE]
    lines = [
        f"Machine: {rows[0]['machine']}; torch {rows[0]['torch']}. Percent of the frozen layer's "
        "step (forward and backward); in brackets what the product's FLOPs would take at the speed "
        "of the base's GEMMs.",
        "",
        f"| cell | frozen ms | {' | '.join(names)} | six products alone |",
        "|---" * (len(names) + 3) + "|",
    ]
    for cell, group in by_cell(rows).items():
        figures = []
        for row in group:
            if row["part"] in _BASE:
                continue
            own, ideal = row["of_the_frozen_step"], row["at_the_speed_of_the_base"]
            text = f"{100 * own:.1f}"
            if ideal:
                text += f" ({100 * ideal / row['frozen_milliseconds']:.1f})"
            figures.append(text)
        base, hot = group[0]["frozen_milliseconds"], group[0]["products_alone_milliseconds"]
        figures.append(f"{100 * hot / base:.1f}")
        lines.append(f"| {cell} | {base:.1f} | {' | '.join(figures)} |")
    lines += [
        "",
        "Geometric means of a step with no other cost than these, over the frozen one:",
        "",
    ]
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        cells = [g[0] for g in by_cell(rows).values() if g[0]["dtype"] == dtype]
        ratios = [1 + c["products_alone_milliseconds"] / c["frozen_milliseconds"] for c in cells]
        lines.append(f"- {dtype}: {geometric_mean(ratios):.3f}")
    return "\n".join(lines) + "\n"


def by_cell(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by a short name of their cell."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        shape = f"{r['tokens']}, {r['in_features']}×{r['out_features']}, r{r['dim']}"
        cells.setdefault(f"{r['dtype']} p={r['dropout']} {shape}", []).append(r)
    return cells


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the parts of each cell above the frozen layer, stacked, with the FLOP floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = by_cell(rows)
    names = [name for name in dict.fromkeys(r["part"] for r in rows) if name not in _BASE]
    figure, axis = plt.subplots(figsize=(11, 0.32 * len(cells) + 1.8))
    left = [0.0] * len(cells)
    for at, name in enumerate(names):
        width = [
            100 * next(r for r in g if r["part"] == name)["of_the_frozen_step"]
            for g in cells.values()
        ]
        axis.barh(list(cells), width, left=left, label=name, color=plt.get_cmap("tab10")(at))
        left = [a + max(b, 0.0) for a, b in zip(left, width, strict=True)]
    floor = [
        100 * sum(r["at_the_speed_of_the_base"] for r in g) / g[0]["frozen_milliseconds"]
        for g in cells.values()
    ]
    axis.plot(floor, list(cells), "k|", ms=12, label="FLOP floor")
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set_xlabel("percent of the frozen layer's step")
    axis.legend(ncols=9, fontsize=7, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    axis.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Profile the grid and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes at rank 16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes, dims = (CPU_SHAPES[:2], [16]) if args.quick else (CPU_SHAPES, [8, 16, 64])
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for p in (0.0, 0.1):
            for tokens, k, n in shapes:
                for dim in dims:
                    case = Case(tokens, k, n, dim, p, dtype)
                    rows += measure(case, rounds=9)
                    print(case, flush=True)
    RESULTS.mkdir(exist_ok=True)
    name = "profile_quick" if args.quick else "profile"
    write_csv(RESULTS / f"{name}.csv", rows)
    text = markdown(rows)
    (RESULTS / f"{name}.md").write_text(text)
    plot(rows, RESULTS / f"{name}.png")
    print("\n" + text)


if __name__ == "__main__":
    main()
