"""The branch of a tensor-parallel linear, against the same branch on its local shapes alone.

Two processes of one thread each. In a round each layer runs forward and backward once, all ranks
together and in a random order. The cost of a branch is the time of the adapted layer less that of
its frozen base in the same round; printed is the median over rounds of the sharded branch's cost
over that of the plain layer of the local shapes. "by DTensors" adds the branch as a user would
write it, operation by operation on DTensors.

    python benchmarks/bench_parallel.py [--quick]

writes parallel.csv to benchmarks/results.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import spawn

from bridge.peft import patch_linear_module
from measure import machine

RESULTS = Path(__file__).parent / "results"
RANKS, DIM, AIM = 2, 16, 1.3
SHAPES = [(512, 2048, 2048), (2048, 2048, 2048), (2048, 2048, 5632)]


class ByDTensors(nn.Module):
    """The branch beside a sharded linear, one DTensor operation after the other."""

    def __init__(self, base: nn.Linear, mesh: DeviceMesh, is_row: bool) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        a, b = torch.randn(DIM, base.in_features), torch.zeros(base.out_features, DIM)
        where = (Shard(1), Replicate()) if is_row else (Replicate(), Shard(0))
        self.a, self.b = (
            nn.Parameter(distribute_tensor(t, mesh, [p]))
            for t, p in zip((a, b), where, strict=True)
        )
        self.mesh, self.input = mesh, Shard(-1) if is_row else Replicate()

    def forward(self, x: Tensor) -> Tensor:
        """The base's result and the branch's, summed."""
        sharded = DTensor.from_local(x, self.mesh, [self.input])
        branch: Any = nn.functional.linear(nn.functional.linear(sharded, self.a), self.b)
        if self.input == Replicate():
            return self.base(x) + branch.to_local()
        return self.base(x) + branch.redistribute(placements=[Replicate()]).to_local()


def layers(k: int, n: int, mesh: DeviceMesh, is_row: bool) -> dict[str, tuple[nn.Module, int]]:
    """Name to layer and the width of its input on this rank."""
    torch.manual_seed(0)
    style = RowwiseParallel if is_row else ColwiseParallel
    frozen = parallelize_module(nn.Linear(k, n), mesh, style()).requires_grad_(False)
    bases = [nn.Linear(k, n) for _ in range(2)]
    for base in bases:
        parallelize_module(base, mesh, style())
    adapted = patch_linear_module(bases[0], dim=DIM)
    shape = (k // RANKS, n) if is_row else (k, n // RANKS)
    local = nn.Linear(*shape).requires_grad_(False)
    return {
        "sharded base": (frozen, shape[0]),
        "sharded adapted": (adapted, shape[0]),
        "by DTensors": (ByDTensors(bases[1], mesh, is_row), shape[0]),
        "local base": (local, shape[0]),
        "local adapted": (patch_linear_module(copy.deepcopy(local), dim=DIM), shape[0]),
    }


def once(layer: nn.Module, x: Tensor) -> float:
    """Seconds of one forward and backward, until all ranks are through.

    A layer that exchanges nothing in backward would else be timed on the first rank alone, and one
    that does until the slower rank has come.
    """
    x.grad = None
    layer.zero_grad(set_to_none=True)
    dist.barrier()
    begin = time.perf_counter()
    layer(x).sum().backward()
    dist.barrier()
    return time.perf_counter() - begin


def cell(tokens: int, k: int, n: int, mesh: DeviceMesh, is_row: bool, rounds: int) -> dict:
    """One row of the table."""
    runs = layers(k, n, mesh, is_row)
    inputs = {
        name: torch.randn(tokens, width, requires_grad=True) for name, (_, width) in runs.items()
    }
    order, shuffle, times = list(runs), random.Random(0), []
    for number in range(rounds + 2):
        shuffle.shuffle(order)
        seconds = {name: once(runs[name][0], inputs[name]) for name in order}
        if number >= 2:
            times.append(seconds)

    def cost(name: str, base: str) -> list[float]:
        return [t[name] - t[base] for t in times]

    local = statistics.median(cost("local adapted", "local base"))
    return {
        "layout": "row" if is_row else "column",
        "tokens": tokens,
        "k": k,
        "n": n,
        "branch / local branch": statistics.median(cost("sharded adapted", "sharded base")) / local,
        "by DTensors / local branch": statistics.median(cost("by DTensors", "sharded base"))
        / local,
        "adapted / base": statistics.median(
            t["sharded adapted"] / t["sharded base"] for t in times
        ),
        "rounds": rounds,
        "machine": machine(),
    }


def measure(rank: int, directory: str, quick: bool) -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    rows = [
        # short steps differ more from round to round
        cell(*shape, mesh, is_row, 7 if quick else 25 * 2048 // shape[0])
        for shape in (SHAPES[:1] if quick else SHAPES)
        for is_row in (False, True)
    ]
    if rank == 0:
        report(rows, quick)
    dist.destroy_process_group()


def report(rows: list[dict], quick: bool) -> None:
    """Print the table, and write it unless it was a quick run."""
    for row in rows:
        figures = {name: f"{value:.3f}" for name, value in row.items() if isinstance(value, float)}
        ratio = row["branch / local branch"]
        verdict = "met" if ratio <= AIM else "MISSED"
        print({**row, **figures}, f"goal {AIM}: {verdict}")
    if not quick:
        with (RESULTS / "parallel.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description="The branch of a tensor-parallel linear")
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        spawn(measure, (directory, arguments.quick), RANKS)


if __name__ == "__main__":
    main()
