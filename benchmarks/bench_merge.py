"""Merging an adapter into a model directory: speed against copying it, and peak memory.

A synthetic bfloat16 checkpoint in the shape of a 1.1-billion-parameter Llama is written to a
temporary directory in five files. Each round copies the directory (`shutil.copytree`) and merges
into it, in random order; the figure is the median over rounds of copying time over merging time,
once until the files are in the system's memory, and once until they are on the disk (`os.sync`).
Peak memory is that of a fresh process: its highest resident set beyond that after the imports.

    python benchmarks/bench_merge.py [--quick] [--directory /tmp]

writes merge.csv and merge.md to benchmarks/results (merge_quick.* with --quick).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bridge.peft.formats.files.safetensors_file import Entry, header_bytes
from bridge.peft.formats.peft.adapter_file import AdapterFile, write_adapter
from bridge.peft.merging.directory import merge_directory
from measure import machine, write_csv

RESULTS = Path(__file__).parent / "results"
RANK = 16
#: Peak memory may be this many times the largest file, and speed this share of copying.
TARGET_MEMORY, TARGET_SPEED = 1.5, 0.6
CASES = {
    "all linears": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "q and v": ["q_proj", "v_proj"],
}
MEASURE_MEMORY = """
import sys
from pathlib import Path
import torch
from bridge.peft.merging.directory import merge_directory

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.ones(2) @ torch.ones(2)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
merge_directory(sys.argv[1], [(sys.argv[2], 1.0)], sys.argv[3])
print(status("VmHWM") - before)
"""


def shapes(layers: int) -> dict[str, tuple[int, int]]:
    """The weights of a Llama with hidden size 2048, by key."""
    hidden, inner, kv, vocabulary = 2048, 5632, 256, 32000
    found = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        block = f"model.layers.{i}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            found[f"{block}.self_attn.{name}_proj.weight"] = (rows, hidden)
        for name in ("gate", "up"):
            found[f"{block}.mlp.{name}_proj.weight"] = (inner, hidden)
        found[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
    found["lm_head.weight"] = (vocabulary, hidden)
    return found


def write_model(directory: Path, layers: int, files: int) -> int:
    """Write the synthetic checkpoint; the size of its largest file."""
    directory.mkdir()
    weights = shapes(layers)
    total = sum(2 * rows * columns for rows, columns in weights.values())
    shards: list[list[Entry]] = [[]]
    for key, (rows, columns) in weights.items():
        end = shards[-1][-1].end if shards[-1] else 0
        if end > total / files:
            shards.append([])
            end = 0
        shards[-1].append(Entry(key, "BF16", (rows, columns), end, end + 2 * rows * columns))
    places = {}
    for i, entries in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        places |= {entry.name: name for entry in entries}
        with open(directory / name, "wb") as file:
            file.write(header_bytes(entries, {}))
            for entry in entries:
                values = torch.randn(entry.shape).mul_(0.02).bfloat16()
                file.write(values.view(torch.uint8).numpy().tobytes())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return max(path.stat().st_size for path in directory.iterdir())


def write_adapter_of(directory: Path, layers: int, names: list[str]) -> Path:
    """Write an adapter of the given projections."""
    tensors = {
        key.removesuffix(".weight"): (torch.randn(RANK, columns), torch.randn(rows, RANK) * 1e-3)
        for key, (rows, columns) in shapes(layers).items()
        if key.split(".")[-2] in names
    }
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": names}
    return write_adapter(AdapterFile(config=config, tensors=tensors), directory)


def timed(run: Callable[[], object], made: Path) -> tuple[float, float]:
    """Seconds of a call that makes a directory, which is removed again, and until it is on disk."""
    os.sync()
    begin = time.perf_counter()
    run()
    returned = time.perf_counter()
    os.sync()
    on_disk = time.perf_counter()
    shutil.rmtree(made)
    return returned - begin, on_disk - begin


def measure(model: Path, adapter: Path, rounds: int) -> dict[str, float]:
    """Copying and merging times of every round, and the peak memory of merging."""
    out, copy = model.with_name("out"), model.with_name("copy")
    runs = {
        "copy": lambda: timed(lambda: shutil.copytree(model, copy), copy),
        "merge": lambda: timed(lambda: merge_directory(model, [(adapter, 1.0)], out), out),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            taken = runs[name]()
            if turn:  # the first round only warms up
                times[name].append(taken)
    command = [sys.executable, "-c", MEASURE_MEMORY, str(model), str(adapter), str(out)]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(out)
    found: dict[str, float] = {"rounds": rounds, "peak_bytes": peak}
    for i, until in enumerate(("", "on_disk_")):
        copies, merges = ([t[i] for t in times[name]] for name in ("copy", "merge"))
        ratios = [c / m for c, m in zip(copies, merges, strict=True)]
        found[f"{until}copy_seconds"] = round(statistics.median(copies), 3)
        found[f"{until}merge_seconds"] = round(statistics.median(merges), 3)
        found[f"{until}speed"] = round(statistics.median(ratios), 3)
        found[f"{until}speed_best"] = round(min(copies) / min(merges), 3)
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """The results as a table, with the targets beside them."""
    lines = [
        f"`python benchmarks/bench_merge.py` on {rows[0]['machine']}, torch {rows[0]['torch']}:",
        f"bfloat16, {rows[0]['model_bytes'] / 1e9:.2f} GB, largest file "
        f"{rows[0]['largest_file'] / 1e6:.0f} MB, rank {RANK}.",
        "",
        f"| adapted | until | copy, s | merge, s | speed of copying (target {TARGET_SPEED:.0%}) | "
        "fastest merge over fastest copy | peak memory, MB | of the largest file (target "
        f"{TARGET_MEMORY:g}×) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = row["peak_bytes"] / row["largest_file"]
        for until, key in (("in memory", ""), ("on disk", "on_disk_")):
            lines.append(
                f"| {row['adapted']} | {until} | {row[f'{key}copy_seconds']:.2f} | "
                f"{row[f'{key}merge_seconds']:.2f} | {row[f'{key}speed']:.0%} | "
                f"{row[f'{key}speed_best']:.0%} | {row['peak_bytes'] / 1e6:.0f} | {share:.2f}× |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the model, two rounds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", help="where to write; about 4.6 GB are needed")
    args = parser.parse_args()
    layers, rounds = (2, 2) if args.quick else (22, args.rounds)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        home = Path(name)
        largest = write_model(home / "base", layers, files=5)
        size = sum(path.stat().st_size for path in (home / "base").iterdir())
        for adapted, names in CASES.items():
            adapter = write_adapter_of(home / adapted.replace(" ", "_"), layers, names)
            row = {"adapted": adapted, "model_bytes": size, "largest_file": largest}
            row |= measure(home / "base", adapter, rounds)
            rows.append(row | {"machine": machine(), "torch": torch.__version__})
            print(rows[-1])
    RESULTS.mkdir(exist_ok=True)
    stem = "merge_quick" if args.quick else "merge"
    write_csv(RESULTS / f"{stem}.csv", rows)
    (RESULTS / f"{stem}.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
