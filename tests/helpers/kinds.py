"""One small model of each kind of base, part and function, for what all of them must do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft.branch.matrix import LoRAMatrix
from tests.helpers.moe_architectures import mixture
from tests.helpers.quantised import KINDS as QUANTISED

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from transformers.pytorch_utils import Conv1D

IDS = torch.arange(3, 27)[None]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind and what it is tried on.

    Attributes:
        base: A fresh base model, with the same values whenever it is made.
        ours: The recipe's fields.
        theirs: Those of PEFT's config for the same; None where PEFT has no such thing.
        run: The output of a model, the same input each time.
        tolerance: How far two ways to compute the same may be apart, of the largest value.
        merged: The same after a merge, which writes bfloat16 in the place of quantised weights.
        mark: Says to PEFT how the base is quantised.
        not_under: Columns of the table that it is not tried under, each with the reason.
    """

    base: Callable[[], nn.Module]
    ours: Mapping[str, Any]
    theirs: Mapping[str, Any] | None = None
    run: Callable[[nn.Module], Tensor] = field(default=lambda model: model(X))
    tolerance: float = 1e-5
    merged: float | None = None
    mark: str | None = None
    not_under: Mapping[str, str] = field(default_factory=dict)


X = torch.randn(6, 128, generator=torch.Generator().manual_seed(3))


class Body(nn.Module):
    """Two layers of a kind with a nonlinearity between."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 128) -> (rows, 128)."""
        return self.second(torch.tanh(self.first(x)))


class Lookup(nn.Module):
    """An embedding and a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Embedding(32, 128), nn.Linear(128, 128)

    def forward(self, ids: Tensor) -> Tensor:
        """(rows, tokens) -> (rows, tokens, 128)."""
        return self.second(torch.tanh(self.first(ids)))


class Images(nn.Module):
    """Two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 128) -> (rows, 4, 3, 3)."""
        return self.second(torch.tanh(self.first(x.view(-1, 2, 8, 8))))


class Attention(nn.Module):
    """An attention of torch and a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.MultiheadAttention(128, 4), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, 128) -> (tokens, 128)."""
        return self.second(torch.tanh(self.first(x, x, x)[0]))


def _looked_up(model: nn.Module) -> Tensor:
    return model(IDS)


def _nf4() -> nn.Module:
    layer: Any = QUANTISED["nf4"][0]()
    layer.support_avx512bf16_for_cpu = False  # the layout for inference rounds to bfloat16
    return layer


def _experts() -> nn.Module:
    return mixture("qwen3_moe")


def _logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


BOTH = {"target_modules": ["first", "second"]}
_FILE = {**BOTH, "r": 4, "lora_alpha": 6}
_LINEAR = {**BOTH, "dim": 4, "alpha": 6, "seed": 0}
_EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
_SPLIT = "the library cannot split these tensors"

KINDS: dict[str, Kind] = {
    "linear": Kind(base=lambda: Body(lambda: nn.Linear(128, 128)), ours=_LINEAR, theirs=_FILE),
    "rsLoRA": Kind(
        base=lambda: Body(lambda: nn.Linear(128, 128)),
        ours={**_LINEAR, "use_rslora": True},
        theirs={**_FILE, "use_rslora": True},
    ),
    "Conv1D": Kind(
        base=lambda: Body(lambda: Conv1D(128, 128)),
        ours=_LINEAR,
        theirs={**_FILE, "fan_in_fan_out": True},
    ),
    "DoRA": Kind(
        base=lambda: Body(lambda: nn.Linear(128, 128)),
        ours={**_LINEAR, "use_dora": True},
        theirs={**_FILE, "use_dora": True},
    ),
    "LoRA-FA": Kind(
        base=lambda: Body(lambda: nn.Linear(128, 128)), ours={**_LINEAR, "freeze_a": True}
    ),
    "PiSSA": Kind(
        base=lambda: Body(lambda: nn.Linear(128, 128)),
        ours={**_LINEAR, "lora_A_init_method": "pissa"},
    ),
    "experts": Kind(
        base=_experts,
        ours={"target_modules": (), **_EXPERTS, "dim": 2, "alpha": 3, "seed": 0},
        theirs={"target_modules": [], **_EXPERTS, "r": 2, "lora_alpha": 3},
        run=_logits,
        not_under={"compile": "transformers' loop over the experts breaks the graph"},
    ),
    "embedding": Kind(base=Lookup, ours=_LINEAR, theirs=_FILE, run=_looked_up),
    "token rows": Kind(
        base=Lookup,
        ours={**_LINEAR, "target_modules": ["second"], "trainable_tokens": {"first": [5, 9, 11]}},
        theirs={
            **_FILE,
            "target_modules": ["second"],
            "trainable_token_indices": {"first": [5, 9, 11]},
        },
        run=_looked_up,
    ),
    "Conv2d": Kind(base=Images, ours=_LINEAR, theirs=_FILE),
    "MultiheadAttention": Kind(base=Attention, ours=_LINEAR, theirs=_FILE),
    "part of a projection": Kind(
        base=lambda: Body(lambda: nn.Linear(128, 128)),
        ours={**_LINEAR, "parts": {"first": [(0, 32), (64, 96)]}},
    ),
    "bitsandbytes nf4": Kind(
        base=lambda: Body(_nf4),
        ours=_LINEAR,
        theirs=_FILE,
        mark="is_loaded_in_4bit",
        merged=0.03,
    ),
    "bitsandbytes int8": Kind(
        base=lambda: Body(QUANTISED["int8"][0]),
        ours=_LINEAR,
        theirs=_FILE,
        mark="is_loaded_in_8bit",
        tolerance=0.03,
        not_under={"FSDP2": "its own forward fails on the shards"},
    ),
    "torchao int8": Kind(
        base=lambda: Body(QUANTISED["torchao int8 float32"][0]),
        ours=_LINEAR,
        theirs=_FILE,
        merged=0.03,
        not_under={"FSDP2": _SPLIT},
    ),
}


def marked(kind: Kind) -> nn.Module:
    """The base of a kind as PEFT wants to see it."""
    model: Any = kind.base()
    if kind.mark:
        setattr(model, kind.mark, True)
    return model


def by_peft(kind: Kind, directory: Any = None) -> Any:
    """PEFT's model of a kind: freshly adapted, or read from a directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if directory is not None:
            return peft.PeftModel.from_pretrained(marked(kind), directory)  # pyright: ignore
        return peft.get_peft_model(marked(kind), peft.LoraConfig(**kind.theirs))  # pyright: ignore


def moved(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """The model, all that is trained moved by the same random numbers each time, in place."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.dtype))
        for matrix in (m for m in model.modules() if isinstance(m, LoRAMatrix)):
            kept = torch.zeros_like(matrix.weight)
            for top, bottom, left, right in matrix.blocks or ():
                kept[top:bottom, left:right] = 1
            if matrix.blocks is not None:
                matrix.weight.mul_(kept)
    return model
