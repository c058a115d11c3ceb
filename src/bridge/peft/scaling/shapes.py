"""What the formulas know of a model: its tensors, how each is split, and the blocks they are in."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bridge.peft.errors import AdapterError
from bridge.peft.model.walk import clean_fqn, unwrap
from bridge.peft.plan import Plan, PlanRow

#: The styles of a model's own tensor parallel plan (transformers' names), by what they split:
#: a linear's outputs (`"column"`), its inputs (`"row"`), or an embedding.
STYLES = {
    "colwise": "column",
    "colwise_rep": "column",
    "packed_colwise": "column",
    "colwise_gather_output": "head",
    "rowwise": "row",
    "rowwise_rep": "row",
    "rowwise_split_input": "row",
    "packed_rowwise": "row",
    "embedding_rowwise": "vocabulary",
    "embedding_colwise": "embedding",
}
#: The dimension that a style splits, from the last one.
_SPLIT = {"column": -2, "head": -2, "vocabulary": -2, "row": -1, "embedding": -1}
#: The linears by which attention, and a block of it and a gated MLP, are told.
_ATTENTION = frozenset(("q_proj", "k_proj", "v_proj", "o_proj"))
_DECODER = _ATTENTION | {"gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One parameter of the adapted model.

    Attributes:
        fqn: Its fully qualified name.
        shape: The whole of it, as it is stored.
        itemsize: Bytes of an element.
        style: How tensor parallel ranks split it, a value of `STYLES`; None: all hold all of it.
        adapter: Whether it is a branch's own: A, B, a start, DoRA's magnitude.
        trained: Whether it gets a gradient.
    """

    fqn: str
    shape: tuple[int, ...]
    itemsize: int
    style: str | None = None
    adapter: bool = False
    trained: bool = False

    @property
    def module(self) -> str:
        """The module that holds it; of A and B the linear."""
        owner = self.fqn.rpartition(".")[0]
        return owner.rpartition(".")[0] if self.adapter else owner

    @functools.cached_property
    def block(self) -> str:
        """The block that it is in (see `block_of`), `""` outside."""
        return block_of(self.fqn)

    @property
    def split(self) -> int | None:
        """The dimension that tensor parallel ranks split, from the last one; of biases outputs'."""
        if self.style is None or not self.shape:
            return None
        if len(self.shape) == 1:
            return -1 if self.style in ("column", "head") else None
        return _SPLIT[self.style]

    def local(self, tp: int) -> tuple[int, ...]:
        """The shape that the first of `tp` tensor parallel ranks holds: the larger one."""
        shape = list(self.shape)
        if self.split is not None:
            shape[self.split] = -(-shape[self.split] // tp)
        return tuple(shape)

    def bytes(self, tp: int) -> int:
        """Bytes on a rank that shards nothing further."""
        return math.prod(self.local(tp)) * self.itemsize

    def shard_bytes(self, tp: int, fsdp: int) -> int:
        """Bytes of the shard, of equal size on all ranks: FSDP2 pads dimension 0."""
        shape = self.local(tp)
        rows = shape[0] if shape else 1
        return -(-rows // fsdp) * math.prod(shape[1:]) * self.itemsize


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """An adapted model on paper.

    Attributes:
        tensors: Every parameter, in the model's order, A and B behind their linear's.
        shared: Parameters that are in `tensors` by another name too: a tied head.
        itemsize: Bytes of an element of the activations, which have the base's dtype.
        half: Whether that is bfloat16, in which float32 A and B are multiplied.
        heads: Attention heads, where the model's config says it.
        unknown_styles: Styles of its plan that these formulas do not know.
    """

    tensors: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]
    itemsize: int
    half: bool = False
    heads: int | None = None
    unknown_styles: tuple[str, ...] = field(default=())

    def style_of(self, fqn: str) -> str | None:
        """How a linear is split, by its name."""
        return self._styles.get(fqn)

    @functools.cached_property
    def _styles(self) -> dict[str, str | None]:
        return {t.module: t.style for t in (*self.shared, *self.tensors) if not t.adapter}

    @functools.cached_property
    def groups(self) -> Mapping[str, Sequence[Tensor]]:
        """The tensors of each block, in the model's order; those outside under `""`."""
        found: dict[str, list[Tensor]] = {"": []}
        for tensor in self.tensors:
            found.setdefault(tensor.block, []).append(tensor)
        return found

    @property
    def blocks(self) -> list[str]:
        """The names of the blocks, in the model's order."""
        return [name for name in self.groups if name]

    @property
    def first_adapted(self) -> int:
        """The number of the first block that a gradient reaches; how many there are if none."""
        order = (
            i for i, name in enumerate(self.blocks) if any(t.trained for t in self.groups[name])
        )
        return next(order, len(self.blocks))

    @functools.cached_property
    def first_branch(self) -> Tensor | None:
        """The first A or B, in the model's order."""
        return next((t for t in self.tensors if t.adapter), None)

    def comes_before_branches(self, tensor: Tensor) -> bool:
        """Whether nothing that a branch has touched reaches a linear of the base."""
        if self.first_branch is None:
            return True
        end = len(self.tensors)
        return self._order.get(tensor.module, end) < self._order[self.first_branch.module]

    @functools.cached_property
    def _order(self) -> dict[str, int]:
        return {t.module: i for i, t in enumerate(self.tensors)}

    def matrices(self, block: str) -> dict[str, Tensor]:
        """A block's matrices of the base by the last part of their module's name."""
        found = (t for t in self.groups.get(block, ()) if not t.adapter and len(t.shape) == 2)
        return {t.module.rpartition(".")[2]: t for t in found}

    def has_attention(self, block: str) -> bool:
        """Whether a block has the four linears of attention, by Llama's names."""
        return self.matrices(block).keys() >= _ATTENTION

    def is_decoder(self, block: str) -> bool:
        """Whether a block has just the linears of a Llama-type one, and two norms."""
        vectors = [t for t in self.groups.get(block, ()) if len(t.shape) == 1]
        norms = [t for t in vectors if not t.fqn.endswith(".bias")]
        linears = self.matrices(block).keys()
        return self.heads is not None and linears == _DECODER and len(norms) == 2


def block_of(fqn: str) -> str:
    """The name up to its first number, `""` where there is none.

    `model.layers.7.mlp.experts.3.up_proj.weight` is in `model.layers.7`: the unit that is
    checkpointed, and that `fully_shard` is called on.
    """
    found = re.match(r"((?:[^.]+\.)*?\d+)(?:\.|$)", fqn)
    return found[1] if found else ""


def shapes_of(plan: Plan, model: nn.Module, tp: int) -> Shapes:
    """Read off a base model, on `meta` too, what the formulas need; touches nothing.

    Args:
        plan: What a recipe would adapt of `model`.
        model: The base model.
        tp: Tensor parallel ranks.

    Raises:
        AdapterError: The model does not say how to split it, or cannot be split so far.
    """
    root = unwrap(model)
    styles: Mapping[str, str] = getattr(root, "tp_plan", None) or getattr(root, "_tp_plan", {})
    config: Any = getattr(root, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if tp > 1:
        _check_split(root, styles, config, tp)
        if any(row.magnitudes or row.subtracts for row in plan.rows):
            raise AdapterError(
                "DoRA, and a start out of the base's weight, are not shared among tensor parallel "
                "ranks; pass --tp 1"
            )
    tensors, shared = _tensors(plan, root, styles)
    floating = [p.dtype for p in root.parameters() if p.is_floating_point()]
    dtype = floating[0] if floating else torch.float32
    return Shapes(
        tensors=tensors,
        shared=shared,
        itemsize=dtype.itemsize,
        half=dtype == torch.bfloat16,
        heads=getattr(config, "num_attention_heads", None),
        unknown_styles=tuple(sorted({s for s in styles.values() if s not in STYLES})),
    )


def _tensors(
    plan: Plan, model: nn.Module, styles: Mapping[str, str]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Every parameter once, A and B behind their linear's; and the other names of shared ones."""
    rows = {row.fqn: row for row in plan.rows}
    full = tuple(f"{row.fqn}." for row in plan.trained_in_full)
    found: list[Tensor] = []
    shared: list[Tensor] = []
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        fqn = clean_fqn(name)
        tensor = Tensor(
            fqn=fqn,
            shape=tuple(parameter.shape),
            itemsize=parameter.element_size(),
            style=STYLES.get(_styled(fqn, styles) or ""),
            trained=fqn.startswith(full),
        )
        (shared if id(parameter) in seen else found).append(tensor)
        seen.add(id(parameter))
        if row := rows.pop(fqn.rpartition(".")[0], None):
            found += _matrices(row, tensor.style)
    return tuple(found), tuple(shared)


def _matrices(row: PlanRow, style: str | None) -> list[Tensor]:
    """A and B of a linear: the one on the side that the base splits is split alike.

    Behind them a frozen start that is subtracted, and DoRA's magnitude, which are never split.
    """
    common: dict[str, Any] = {"itemsize": row.dtype.itemsize, "adapter": True}
    shapes = {"a": (row.dim, row.in_features), "b": (row.out_features, row.dim)}
    styles = {
        "a": style if style == "row" else None,
        "b": style if style in ("column", "head") else None,
    }
    trained = {"a": row.trains_a, "b": True}
    found = [
        Tensor(
            fqn=f"{row.fqn}.lora_{which}.weight",
            shape=shape,
            style=styles[which],
            trained=trained[which],
            **common,
        )
        for which, shape in shapes.items()
    ]
    if row.subtracts:
        start = f"{row.fqn}.lora_start"
        found += [Tensor(fqn=f"{start}.{w}", shape=shape, **common) for w, shape in shapes.items()]
    if row.magnitudes:
        name = f"{row.fqn}.lora_magnitude.weight"
        found.append(Tensor(fqn=name, shape=(row.out_features,), trained=True, **common))
    return found


def _styled(fqn: str, styles: Mapping[str, str]) -> str | None:
    """The style of a parameter: its own entry in the plan, or its module's."""
    starred = re.sub(r"(?<=\.)\d+(?=\.)", "*", fqn)
    return styles.get(starred) or styles.get(starred.rpartition(".")[0])


def _check_split(model: nn.Module, styles: Mapping[str, str], config: Any, tp: int) -> None:
    if not styles:
        raise AdapterError(
            f"{type(model).__name__} does not say how tensor parallel ranks split it (it has no "
            "tp_plan); pass --tp 1"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % tp:
            raise AdapterError(
                f"tp {tp} does not divide the model's {heads} {name}; pass a tp that does"
            )
