"""A whole Llama: a training step over the frozen model's, then patching, files and generation.

24 layers of width 1024, all linears adapted at rank 16, 4 × 128 tokens, float32 (bfloat16 on CUDA).
A step is forward and backward from given input embeddings that want gradients, in all three models.

    python benchmarks/bench_model.py [--quick]

writes model.csv and model.md to benchmarks/results (model_quick.* with --quick: 4 layers).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bridge.peft import LoRA, load_adapter, merge, save_adapter, unmerge
from measure import machine, median_ratio, paired_times, write_csv

RESULTS = Path(__file__).parent / "results"
DIM, ALPHA, LAYERS = 16, 32, 24
#: What we aim at for a step on the CPU, over the frozen model's.
TARGET = 1.10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def base(layers: int) -> LlamaForCausalLM:
    """A Llama with random weights, the same at each call, frozen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
    )
    model = LlamaForCausalLM(config)
    model.to(device=DEVICE, dtype=DTYPE)  # pyright: ignore
    model.requires_grad_(False)
    return model


def with_peft(model: nn.Module) -> nn.Module:
    """Adapt with Hugging Face PEFT."""
    config = peft.LoraConfig(r=DIM, lora_alpha=ALPHA, target_modules="all-linear")
    return peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def with_ours(model: nn.Module) -> nn.Module:
    """Adapt with the recipe."""
    return LoRA(dim=DIM, alpha=ALPHA)(model)


def step(model: nn.Module, embeddings: Tensor, dy: Tensor) -> None:
    """One forward and backward, gradients fresh."""
    embeddings.grad = None
    model.zero_grad(set_to_none=True)
    model(inputs_embeds=embeddings).logits.backward(dy)


def steps(models: dict[str, nn.Module], budget: float) -> list[dict[str, Any]]:
    """Time a step of every model, paired."""
    embeddings = torch.randn(4, 128, 1024, device=DEVICE, dtype=DTYPE, requires_grad=True)
    dy = torch.randn(4, 128, 1024, device=DEVICE, dtype=DTYPE)
    runs = {name: lambda m=model: step(m, embeddings, dy) for name, model in models.items()}
    times, disturbed = paired_times(runs, budget)
    return [
        row("step", name, statistics.median(t), median_ratio(t, times["frozen"]), disturbed)
        for name, t in times.items()
    ]


def row(what: str, name: str, seconds: float, ratio: float, disturbed: int = 0) -> dict[str, Any]:
    """One measurement; the ratio is to the frozen model, or to ours where there is none."""
    return {
        "what": what,
        "model": name,
        "seconds": round(seconds, 4),
        "ratio": round(ratio, 4),
        "disturbed": disturbed,
        "machine": machine(),
        "torch": torch.__version__,
        "peft": peft.__version__,
    }


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def compared(what: str, ours: Callable[[], float], theirs: Callable[[], float]) -> list[dict]:
    """Seconds of something that is done once, ours and PEFT's, best of three, alternating."""
    mine, peers = (min(pair) for pair in zip(*((ours(), theirs()) for _ in range(3)), strict=True))
    return [row(what, "ours", mine, 1.0), row(what, "peft", peers, peers / mine)]


def files(models: dict[str, Any], layers: int) -> list[dict[str, Any]]:
    """Patching a model, saving the adapter, and loading it into a base."""

    def fresh(run: Callable[[Any], object]) -> Callable[[], float]:
        def seconds() -> float:
            model = base(layers)
            return timed(lambda: run(model))

        return seconds

    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = str(Path(directory, "ours")), str(Path(directory, "theirs"))
        return [
            *compared("patch", fresh(with_ours), fresh(with_peft)),
            *compared(
                "save the adapter",
                lambda: timed(lambda: save_adapter(models["ours"], ours)),
                lambda: timed(lambda: models["peft"].save_pretrained(theirs)),
            ),
            *compared(
                "load the adapter",
                fresh(lambda model: load_adapter(model, ours)),
                fresh(lambda model: peft.PeftModel.from_pretrained(model, theirs)),
            ),
        ]


def generation(models: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """Greedy generation of a few tokens, unmerged and merged."""
    prompt = torch.arange(16, device=DEVICE)[None]

    def generate(model: Any) -> Callable[[], object]:
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        return lambda: model.generate(input_ids=prompt, pad_token_id=0, **settings)

    rows = []
    for model in models.values():
        model.eval()
    with torch.no_grad():
        times, disturbed = paired_times({n: generate(m) for n, m in models.items()}, 10.0, least=5)
        for name, t in times.items():
            ratio = median_ratio(t, times["frozen"])
            rows.append(row("generate, unmerged", name, statistics.median(t), ratio, disturbed))
        merge(models["ours"])
        pair = {name: generate(models[name]) for name in ("frozen", "ours")}
        times, disturbed = paired_times(pair, 10.0, least=5)
        unmerge(models["ours"])
    ratio = median_ratio(times["ours"], times["frozen"])
    rows.append(row("generate, merged", "ours", statistics.median(times["ours"]), ratio, disturbed))
    return rows


def markdown(rows: list[dict[str, Any]], layers: int) -> str:
    """All measurements as a table."""
    lines = [
        f"Machine: {rows[0]['machine']}; torch {rows[0]['torch']}, PEFT {rows[0]['peft']}. Llama, "
        f"{layers} layers × 1024, all linears, rank {DIM}, "
        f"{str(DTYPE).removeprefix('torch.')}; a step is 4 × 128 tokens.",
        "",
        "| what | model | seconds | ratio |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['what']} | {r['model']} | {r['seconds']:.3f} | {r['ratio']:.3f} |" for r in rows
    ]
    lines += ["", "Ratios of steps and generation are to the frozen model, the others to ours."]
    ratio = next(r["ratio"] for r in rows if (r["what"], r["model"]) == ("step", "ours"))
    if layers == LAYERS and DEVICE == "cpu":
        verdict = "met" if ratio <= TARGET else "missed"
        lines += [
            "",
            f"Target for a step of ours: {TARGET:.2f} times the frozen model's; {verdict}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 layers instead of 24")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    layers = 4 if args.quick else LAYERS
    models: dict[str, nn.Module] = {
        "frozen": base(layers),
        "ours": with_ours(base(layers)),
        "peft": with_peft(base(layers)),
    }
    rows = steps(models, 5.0 if args.quick else 30.0)
    rows += generation(models, 8 if args.quick else 16)
    rows += files(models, layers)
    RESULTS.mkdir(exist_ok=True)
    name = "model" + "_cuda" * (DEVICE == "cuda") + "_quick" * args.quick
    write_csv(RESULTS / f"{name}.csv", rows)
    text = markdown(rows, layers)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
