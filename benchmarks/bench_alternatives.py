"""A way to save narrow products that the library leaves out: merging on the fly.

W + s B A is formed in each pass (Cherniuk et al., "Run LoRA Run", 2023), so that four narrow
products and two of the weight's size do the work of six. In float32 only: in bfloat16 the sum would
swallow small updates. Timed against the frozen layer and the library's, in one process, paired.

    python benchmarks/bench_alternatives.py [--budget SECONDS]

writes alternatives.csv and alternatives.md to benchmarks/results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench_linear import CPU_SHAPES, geometric_mean
from bridge.peft import patch_linear_module
from bridge.peft.ops.products import contract, contract_backward, expand_backward
from measure import machine, median_ratio, paired_times, write_csv
from peers import Case

RESULTS = Path(__file__).parent / "results"
SCALE = 2.0


class _OnTheFly(torch.autograd.Function):
    """``y = (W + s B A) x``, the sum formed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = contract(x.flatten(0, -2), a, None)
        ctx.save_for_backward(x, weight, a, b, h)
        return F.linear(x, torch.addmm(weight, b, a, alpha=SCALE))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, h = ctx.saved_tensors
        dh, db = expand_backward(dy.flatten(0, -2), h, b.t(), SCALE, None)
        dx = dy @ torch.addmm(weight, b, a, alpha=SCALE)
        return dx, None, contract_backward(x.flatten(0, -2), dh, a, SCALE, None, None), db.t()


class OnTheFly(nn.Module):
    """One linear, merged in each pass."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.base, self.lora = case.base(), ours(case)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        a, b = (self.lora.get_parameter(f"lora_{name}.weight") for name in "ab")
        return _OnTheFly.apply(x, self.base.weight, a, b)  # pyright: ignore[reportReturnType]


def ours(case: Case) -> nn.Module:
    """The library's layer, B not zero."""
    layer = patch_linear_module(case.base(), dim=case.dim, alpha=int(SCALE * case.dim))
    nn.init.normal_(layer.get_parameter("lora_b.weight"), std=0.02)
    return layer


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    """One forward and backward, gradients fresh."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    layer(x).backward(dy)


def compare(case: Case, budget: float) -> dict[str, Any]:
    """Check that ours and the alternative agree, and time them over the frozen layer."""
    layers = {"frozen": case.base(), "ours": ours(case), "on the fly": OnTheFly(case)}
    x, dy = case.tensors()
    gradients = []
    for name in ("ours", "on the fly"):
        step(layers[name], x, dy)
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * dy.shape[-1] ** 0.5)
    runs = {name: lambda layer=layer: step(layer, x, dy) for name, layer in layers.items()}
    times, disturbed = paired_times(runs, budget)
    return {
        "tokens": case.tokens,
        "in_features": case.in_features,
        "out_features": case.out_features,
        "dim": case.dim,
        "ours": round(median_ratio(times["ours"], times["frozen"]), 4),
        "on_the_fly": round(median_ratio(times["on the fly"], times["frozen"]), 4),
        "on_the_fly_over_ours": round(median_ratio(times["on the fly"], times["ours"]), 4),
        "disturbed": disturbed,
        "machine": machine(),
        "torch": torch.__version__,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """All cells, and their geometric mean."""
    lines = [
        f"Machine: {rows[0]['machine']}; torch {rows[0]['torch']}. Time of forward and backward "
        "over the frozen layer's, medians of pairs, float32, without dropout.",
        "",
        "| tokens, in×out, rank | ours | on the fly | on the fly over ours |",
        "|---|---|---|---|",
    ]
    for r in rows:
        cell = f"{r['tokens']}, {r['in_features']}×{r['out_features']}, r{r['dim']}"
        lines.append(
            f"| {cell} | {float(r['ours']):.3f} | {float(r['on_the_fly']):.3f} | "
            f"{float(r['on_the_fly_over_ours']):.3f} |"
        )
    mean = geometric_mean([float(r["on_the_fly_over_ours"]) for r in rows])
    return "\n".join([*lines, "", f"On the fly takes {mean:.3f} of ours on average."]) + "\n"


def main() -> None:
    """Measure the alternative and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a cell, about")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for shape in CPU_SHAPES:
        for dim in (8, 16, 64):
            rows.append(compare(Case(*shape, dim, 0.0, torch.float32), args.budget))
            print(rows[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    write_csv(RESULTS / "alternatives.csv", rows)
    (RESULTS / "alternatives.md").write_text(markdown(rows))
    print("\n" + markdown(rows))


if __name__ == "__main__":
    main()
