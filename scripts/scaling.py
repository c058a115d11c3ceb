"""Print the tables of docs/scaling.md and draw its figure: 70B and 405B on 8 to 1,024 GPUs.

Usage: python scripts/scaling.py [--figure docs/scaling.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
import transformers
from torch import nn

from bridge.peft import LoRA
from bridge.peft.plan import Plan
from bridge.peft.scaling import Layout, RankCost, per_rank

#: The shapes of Llama 3: layers, hidden, MLP, heads; 8 key/value heads, vocabulary 128,256.
MODELS = {"70B": (80, 8192, 28672, 64), "405B": (126, 16384, 53248, 128)}
#: What makes a `Layout` of a world; ranks that are left over are replicas.
LAYOUTS = {
    "FSDP": lambda world: {"fsdp": world},
    "HSDP, 8 shards": lambda world: {"fsdp": 8},
    "TP 8 × FSDP": lambda world: {"tp": 8},
    "TP 8, SP × FSDP": lambda world: {"tp": 8, "sequence_parallel": True},
    "TP 8, SP × DP": lambda world: {"tp": 8, "sequence_parallel": True, "fsdp": 1},
}
WORLDS = (8, 64, 1024)
RECIPE = LoRA(dim=16)
TOKENS = 8192


def base_model(name: str) -> nn.Module:
    """A model of that shape on meta, in bfloat16."""
    layers, hidden, mlp, heads = MODELS[name]
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def cost(plan: Plan, model: nn.Module, layout: str, world: int) -> RankCost:
    """What a rank of a layout costs: one sequence of 8,192 tokens, blocks checkpointed."""
    sizes = {"world": world, "tokens": TOKENS, "checkpointing": True}
    return per_rank(plan, model, Layout(**sizes, **LAYOUTS[layout](world)))


def rows(name: str, worlds: Sequence[int] = WORLDS) -> Iterator[str]:
    """The lines of a model's table, without its head."""
    model = base_model(name)
    plan = RECIPE.plan(model)
    for world in worlds:
        for layout in LAYOUTS:
            yield _row(world, layout, cost(plan, model, layout, world))


def _row(world: int, layout: str, found: RankCost) -> str:
    memory = {key: value or 0 for key, value in found.memory.items()}
    trained = memory["adapter"] + memory["gradients"] + memory["optimizer"]
    sent = {over: 0 for over in ("fsdp", "tp", "dp")}
    for t in found.traffic:
        sent[t.over] += t.wire_bytes
    numbers = [memory["base"], trained, memory["working_set"], found.bytes_kept, found.bytes]
    numbers += [*sent.values(), found.adapter_wire_bytes]
    cells = " | ".join(map(_gigabytes, numbers))
    return f"| {world:,} | {layout} | {cells} | {_per_token(found):.0f} |"


def _per_token(found: RankCost) -> float:
    """MB that a GPU sends for each token of its share: `tp` of them work on the same ones."""
    return found.wire_bytes * found.layout.tp / found.layout.tokens / 1e6


def _gigabytes(count: int) -> str:
    return "–" if count == 0 else f"{count / 1e9:.2f}" if count < 1e10 else f"{count / 1e9:.1f}"


def draw(path: str) -> None:
    """Bytes held, and sent for a token, over the number of GPUs, for both models."""
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    worlds = [2**power for power in range(3, 11)]
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    for column, name in enumerate(MODELS):
        model = base_model(name)
        plan = RECIPE.plan(model)
        held, sent = axes[0][column], axes[1][column]
        for layout in LAYOUTS:
            costs = [cost(plan, model, layout, world) for world in worlds]
            held.plot(worlds, [c.bytes / 1e9 for c in costs], marker="o", label=layout)
            sent.plot(worlds, [_per_token(c) for c in costs], marker="o")
        held.axhline(80, color="grey", linestyle=":", label="80 GB")
        held.set(title=f"{name}: GB held by a GPU", xscale="log", yscale="log", ylim=(3, 200))
        held.set_yticks([5, 10, 20, 40, 80, 160])
        sent.set(title=f"{name}: MB sent for a token", xscale="log", xlabel="GPUs", ylim=(0, None))
        held.yaxis.set_major_formatter(ScalarFormatter())
        held.yaxis.set_minor_formatter(NullFormatter())
        sent.set_xticks(worlds, [f"{world:,}" for world in worlds])
        sent.minorticks_off()
        for axis in (held, sent):
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Print the tables; draw the figure where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", help="where to write the figure (PNG)")
    arguments = parser.parse_args()
    for name in MODELS:
        print(name, *rows(name), sep="\n", end="\n\n")
    if arguments.figure:
        draw(arguments.figure)


if __name__ == "__main__":
    main()
