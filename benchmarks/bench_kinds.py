"""Functions and kinds of bases beside PEFT: one training step over the frozen base's.

Each case is a function that gives steps by name, `frozen` among them; `@case` puts it into the
table. Every step is timed once a round in random order, in one process; a figure is the median over
rounds of a step's time over the frozen one's of the same round.

    python benchmarks/bench_kinds.py [--quick] [--only dora|quantised|experts|embedding|…]

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


def experts_steps(how: str, quick: bool, dropout: float) -> Steps:
    """16 experts of 512 × 768, two a token, 2048 tokens, rank 16, float32, computed in one way.

    PEFT has no dropout there; its own step without it stands beside ours with it.
    """
    tokens, experts = (256, 4) if quick else (2048, 16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 512, generator=generator, requires_grad=True)
    index = torch.rand(tokens, experts, generator=generator).topk(2).indices
    arguments = (x, index, torch.full((tokens, 2), 0.5))
    models = {
        "frozen": _experts(how, experts),
        "ours": _experts_by_us(_experts(how, experts), dropout),
        "peft": _experts_by_peft(_experts(how, experts)),
    }
    return {name: lambda m=m: _experts_step(m, x, arguments) for name, m in models.items()}


case("experts, one by one", goal=1.15)(lambda quick: experts_steps("eager", quick, 0.0))
case("experts, grouped", goal=1.15)(lambda quick: experts_steps("grouped_mm", quick, 0.0))
case("experts, grouped, dropout 0.1")(lambda quick: experts_steps("grouped_mm", quick, 0.1))


class _Holder(nn.Module):
    """Experts below another module, since PEFT adapts no parameter of the model itself."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *arguments: Any) -> Any:
        return self.experts(*arguments)


_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def _experts(how: str, count: int) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=512, moe_intermediate_size=768, num_experts=count)
    config._experts_implementation = how
    module = Qwen3MoeExperts(config)
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return _Holder(module).requires_grad_(False)


def _experts_by_us(model: nn.Module, dropout: float) -> nn.Module:
    recipe = LoRA(target_modules=(), target_parameters=_EXPERTS, dim=16, dropout=dropout)
    return _with_b(recipe(model), "lora_b")


def _experts_by_peft(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=16, target_modules=[], target_parameters=_EXPERTS)
    return _with_b(peft.get_peft_model(model, config), "lora_B")  # pyright: ignore


def _with_b(model: nn.Module, name: str) -> nn.Module:
    for fqn, parameter in model.named_parameters():
        if name in fqn:
            nn.init.normal_(parameter, std=0.02)
    return model


def _experts_step(model: nn.Module, x: torch.Tensor, arguments: tuple[Any, ...]) -> None:
    x.grad = None
    model.zero_grad(set_to_none=True)
    model(*arguments).backward(torch.ones_like(x))


class _Lookup(nn.Module):
    """An embedding of 32,000 × 1024 before a linear of 1024², through which backward goes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = nn.Embedding(32_000, 1024), nn.Linear(1024, 1024)
        self.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.embedding(ids)
        # in a model the frozen base has a backward there too, of the branches below
        return self.linear(found if found.requires_grad else found.requires_grad_())


class _Attention(nn.Module):
    """Torch's attention of 1024 in 16 heads, over itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(1024, 16).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def part_steps(
    base: Callable[[], nn.Module], x: torch.Tensor, ours: dict[str, Any], theirs: dict[str, Any]
) -> Steps:
    """A module frozen, with our branch and with PEFT's."""
    import peft

    config = peft.LoraConfig(r=16, **theirs)
    models = {
        "frozen": base(),
        "ours": _with_b(LoRA(dim=16, **ours)(base()), "lora_b"),
        "peft": _with_b(peft.get_peft_model(base(), config), "lora_B"),  # pyright: ignore
    }
    dy = torch.ones_like(models["frozen"](x))
    return {name: lambda m=m: step(m, x, dy) for name, m in models.items()}


def _tokens(quick: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(32_000, (4, 128 if quick else 512), generator=generator)


@case("embedding, 32,000 × 1024 before 1024²")
def embedding_steps(quick: bool) -> Steps:
    """A branch on an embedding, 2048 tokens, rank 16, float32."""
    targets = {"target_modules": ["embedding"]}
    return part_steps(_Lookup, _tokens(quick), targets, targets)


@case("tokens, 100 rows of 32,000 × 1024 before 1024²")
def tokens_steps(quick: bool) -> Steps:
    """A hundred token rows beside a branch on the linear, 2048 tokens, rank 16, float32."""
    targets, rows = {"target_modules": ["linear"]}, {"embedding": list(range(100))}
    return part_steps(
        _Lookup,
        _tokens(quick),
        {**targets, "trainable_tokens": rows},
        {**targets, "trainable_token_indices": rows},
    )


@case("attention, nn.MultiheadAttention of 1024")
def attention_steps(quick: bool) -> Steps:
    """Both projections of torch's attention, 4 × 512 tokens, rank 16, float32."""
    # with batch_first torch takes a slow product, for frozen weights alone
    x = torch.randn(128 if quick else 512, 4, 1024, requires_grad=True)
    targets = {"target_modules": ["attention"]}
    return part_steps(_Attention, x, targets, targets)


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
