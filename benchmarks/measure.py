"""How the benchmarks measure: paired times, bytes saved for backward, peak memory, the machine."""

from __future__ import annotations

import csv
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def machine() -> str:
    """Name of the processor or GPU, with the threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    """One forward and backward, gradients fresh."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    layer(x).backward(dy)


def seconds(run: Callable[[], object]) -> float:
    """Time of one call: by events on CUDA, by the wall clock elsewhere."""
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def elsewhere() -> float:
    """Processor seconds that other processes have used since the machine started (Linux)."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, irq, soft, steal, *_ = map(int, path.read_text().split()[1:11])
    own = os.times()
    busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system


def paired_times(
    runs: Mapping[str, Callable[[], object]], budget: float, least: int = 7, most: int = 200
) -> tuple[dict[str, list[float]], int]:
    """Time every run once a round, in a new random order each round.

    A round in which other processes took more than 4 % of the wall time (and 20 ms, the clock's
    grain) is measured again, as long as there is time: three times the budget and 7 rounds.

    Args:
        runs: Name to what is timed.
        budget: Seconds after which no new round begins.
        least: Rounds at least.
        most: Rounds at most.

    Returns:
        Name to seconds, one value a round, where values of the same round are a pair; and how
        many rounds were disturbed and kept, 0 on a quiet machine.
    """
    order = list(runs)
    for _ in range(2):
        for name in order:
            runs[name]()
    quiet: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    shuffle, begin = random.Random(0), time.perf_counter()

    def wanted() -> bool:
        spent = time.perf_counter() - begin
        if len(quiet) < least:
            return len(quiet) + len(disturbed) < least or spent < 3 * budget
        return len(quiet) < most and spent < budget

    while wanted():
        shuffle.shuffle(order)
        others, start = elsewhere(), time.perf_counter()
        times = {name: seconds(runs[name]) for name in order}
        wall = time.perf_counter() - start
        calm = elsewhere() - others <= 0.02 + 0.04 * wall
        (quiet if calm else disturbed).append(times)
    missing = max(0, least - len(quiet))
    rounds = quiet + disturbed[:missing]
    return {name: [r[name] for r in rounds] for name in runs}, min(missing, len(disturbed))


def median_ratio(times: Iterable[float], of: Iterable[float]) -> float:
    """Median over rounds of the ratio of the two times of a round."""
    return statistics.median(a / b for a, b in zip(times, of, strict=True))


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes autograd keeps for backward beyond x and the parameters, by unique storage."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x)
    del out
    return sum(saved.values())


def peak_bytes(layer: nn.Module, x: Tensor, dy: Tensor) -> int:
    """Most bytes allocated at once by a step, beyond x, dy and the parameters."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(layer, x, dy)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(layer, x, dy)
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events: list[Any] = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys, with a header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
