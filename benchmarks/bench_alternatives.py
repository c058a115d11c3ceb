"""Two ways to save narrow products: one that the library leaves out, one that it has on request.

* Merged on the fly (Cherniuk et al., "Run LoRA Run", 2023): W + s B A is formed in each pass, so
  that four narrow products and two of the weight's size do the work of six. In float32 only: in
  bfloat16 the sum would swallow small updates.
* Shared input (`share_inputs`): q, k and v, or gate and up, read one x and are computed together.

Both are timed against the frozen layers and the library's, in one process, paired.

    python benchmarks/bench_alternatives.py [--budget SECONDS]

writes alternatives.csv and alternatives.md to benchmarks/results.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench_linear import CPU_SHAPES, geometric_mean
from bridge.peft import patch_linear_module, share_inputs
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


class Siblings(nn.Module):
    """Linears of one input, under the names by which `share_inputs` knows them."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj") if len(layers) == 3 else ("gate_proj", "up_proj")
        for name, layer in zip(names, layers, strict=True):
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (..., in) to one (..., out) for each linear."""
        return tuple(layer(x) for layer in self.children())


def ours(case: Case) -> nn.Module:
    """The library's layer, B not zero."""
    layer = patch_linear_module(case.base(), dim=case.dim, alpha=int(SCALE * case.dim))
    nn.init.normal_(layer.get_parameter("lora_b.weight"), std=0.02)
    return layer


def step(layer: nn.Module, x: Tensor, dys: Sequence[Tensor]) -> None:
    """One forward and backward, gradients fresh."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    out = layer(x)
    torch.autograd.backward(out if isinstance(out, tuple) else (out,), dys)


def compare(
    what: str, case: Case, layers: dict[str, nn.Module], count: int, budget: float
) -> dict[str, Any]:
    """Check that ours and the alternative agree, and time them over the frozen layers."""
    x, _ = case.tensors()
    shape = (*x.shape[:-1], case.out_features)
    dys = [torch.randn(shape, dtype=case.dtype) for _ in range(count)]
    gradients = []
    for name in ("ours", what):
        step(layers[name], x, dys)
        assert x.grad is not None
        gradients.append(x.grad)
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance * shape[-1] ** 0.5)
    runs = {name: lambda layer=layer: step(layer, x, dys) for name, layer in layers.items()}
    times, disturbed = paired_times(runs, budget)
    return {
        "alternative": what,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tokens": case.tokens,
        "in_features": case.in_features,
        "out_features": case.out_features,
        "linears": count,
        "dim": case.dim,
        "ours": round(median_ratio(times["ours"], times["frozen"]), 4),
        "alternative_ratio": round(median_ratio(times[what], times["frozen"]), 4),
        "alternative_over_ours": round(median_ratio(times[what], times["ours"]), 4),
        "disturbed": disturbed,
        "machine": machine(),
        "torch": torch.__version__,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """All cells, and the geometric mean of each alternative over ours."""
    lines = [
        f"Machine: {rows[0]['machine']}; torch {rows[0]['torch']}. Time of forward and backward "
        "over the frozen layers', medians of pairs, without dropout.",
        "",
        "| alternative | cell | ours | alternative | alternative over ours |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        shape = f"{r['tokens']}, {r['in_features']}×{r['out_features']}, r{r['dim']}"
        lines.append(
            f"| {r['alternative']} | {r['dtype']} {r['linears']} × ({shape}) | {r['ours']:.3f} | "
            f"{r['alternative_ratio']:.3f} | {r['alternative_over_ours']:.3f} |"
        )
    lines.append("")
    for what in dict.fromkeys((r["alternative"], r["dtype"]) for r in rows):
        of = [r["alternative_over_ours"] for r in rows if (r["alternative"], r["dtype"]) == what]
        lines.append(f"{what[0]}, {what[1]}: {geometric_mean(of):.3f} of ours on average.")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure both alternatives and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a cell, about")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in CPU_SHAPES:
            for dim in (8, 16, 64):
                case = Case(*shape, dim, 0.0, dtype)
                if dtype == torch.float32:
                    single = {
                        "frozen": case.base(),
                        "ours": ours(case),
                        "on the fly": OnTheFly(case),
                    }
                    rows.append(compare("on the fly", case, single, 1, args.budget))
                    print(rows[-1], flush=True)
                count = 3 if shape[1] == shape[2] else 2
                several = {
                    "frozen": Siblings([case.base() for _ in range(count)]),
                    "ours": Siblings([ours(case) for _ in range(count)]),
                    "shared": share_inputs(Siblings([ours(case) for _ in range(count)])),
                }
                rows.append(compare("shared", case, several, count, args.budget))
                print(rows[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    write_csv(RESULTS / "alternatives.csv", rows)
    text = markdown(rows)
    (RESULTS / "alternatives.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
