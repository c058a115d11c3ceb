"""How Megatron Core splits a linear over tensor parallel ranks, and what that asks of a branch.

A column parallel linear holds rows of W, a row parallel one columns of W. So do the factors:

    base    A (dim, in)      B (out, dim)
    column  whole            its rows
    row     its columns      whole

and these exchanges, of h = A x and its gradient, are all that the mathematics asks for:

    base    how                h in forward     dh in backward   gradient of the whole factor
    column  x on every rank    –                summed           complete
    column  sequence parallel  gathered         summed, split    a part of the tokens: summed
    column  expert             –                –                a part of the sum: summed
    row     y on every rank    summed           –                complete
    row     sequence parallel  summed, split    gathered         a part of the tokens: summed
    row     expert             –                –                a part of the sum: summed

An expert's tokens are gathered, and its result summed, by Megatron's token dispatcher. All sums of
gradients happen in autograd: after backward each rank holds the gradient of its part of A and B,
and of a whole factor the same one everywhere. So a plain loop is right as it is, and so are
Megatron's own DDP, optimizer and `finalize_model_grads`: the latter sums over the tensor parallel
group only what is marked `sequence_parallel`, which A and B never are. They carry
`tensor_model_parallel`, `partition_dim` and `partition_stride`, by which Megatron's gradient norm
counts every shard and each whole factor once, and the base's `allreduce`, by which its DDP finds
the ranks with other data for the same expert.

Nothing of Megatron is imported here: its classes are known by their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from bridge.peft.parallel.exchange import Exchange, Way
from bridge.peft.parallel.shard import Shard

_COLUMN = ("ColumnParallelLinear", "TEColumnParallelLinear", "TELayerNormColumnParallelLinear")
_ROW = ("RowParallelLinear", "TERowParallelLinear")
_EMBEDDING = "VocabParallelEmbedding"
_GROUPED = (
    *("GroupedMLP", "TEGroupedMLP", "TEGroupedLinear"),
    *("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"),
)
#: The linear that holds gate over up in a gated MLP, by Megatron's name for it.
_GATED = "linear_fc1"
#: What becomes of h and of its gradient: by whether the base is column parallel, and how.
_EXCHANGES: dict[tuple[bool, str], tuple[Way, Way]] = {
    (True, "whole"): ("keep", "sum"),
    (True, "sequence"): ("gather", "scatter"),
    (True, "expert"): ("keep", "keep"),
    (False, "whole"): ("sum", "keep"),
    (False, "sequence"): ("scatter", "gather"),
    (False, "expert"): ("keep", "keep"),
}


def takes(cls: type[nn.Module]) -> bool:
    """Whether this is a class of Megatron's parallel linears, or of its grouped experts."""
    return bool(_names(cls) & {*_COLUMN, *_ROW, *_GROUPED})


def is_embedding(cls: type[nn.Module]) -> bool:
    """Whether this is a class of Megatron's embeddings."""
    return _EMBEDDING in _names(cls)


def is_transformer_block(cls: type[nn.Module]) -> bool:
    """Whether this is a class of Megatron's stacks of layers."""
    return "TransformerBlock" in _names(cls)


def refusal_of(module: nn.Module) -> str | None:
    """Why a branch cannot stand beside a module of such a class; None if it can.

    Args:
        module: It is not touched.
    """
    names, config = _names(type(module)), getattr(module, "config", None)
    if names & {*_GROUPED}:
        return (
            "it holds the weights of several experts in one; build the model with "
            "moe_grouped_gemm=False (SequentialMLP), whose linears can be adapted"
        )
    if getattr(module, "weight", None) is None:
        return "it has no weight of its own (share_embeddings_and_output_weights)"
    if getattr(module, "gather_output", False) or not getattr(module, "input_is_parallel", True):
        return "it gathers its output, or splits its input, which the branch beside it would not"
    if getattr(config, "pipeline_model_parallel_size", 1) > 1:
        return (
            "the names of layers begin anew on each pipeline stage, which is not supported yet; "
            "use pipeline_model_parallel_size=1"
        )
    return _refusal_of_expert(module, config) if getattr(module, "is_expert", False) else None


def _refusal_of_expert(module: nn.Module, config: Any) -> str | None:
    if config.expert_model_parallel_size > 1:
        return (
            "the names of experts begin anew on each expert parallel rank, which is not supported "
            "yet; use expert_model_parallel_size=1"
        )
    size, wanted = LinearLayout.of(module).size, config.tensor_model_parallel_size
    if size != wanted:
        return (
            f"its experts are split over {size} ranks and the rest of the model over {wanted}, "
            "whose tokens differ and whose gradients nobody would sum; use "
            f"expert_tensor_parallel_size={wanted}"
        )
    return None


def _names(cls: type[nn.Module]) -> set[str]:
    """The names of the classes of Megatron Core that a class is or derives from."""
    return {base.__name__ for base in cls.__mro__ if base.__module__.startswith("megatron.core.")}


@dataclass(frozen=True, kw_only=True)
class LinearLayout:
    """How one of Megatron's linears lies on the ranks.

    Attributes:
        group: The tensor parallel ranks; None without `torch.distributed`.
        is_column: It holds rows of W; else columns.
        sequence_parallel: Its tokens are split over the same ranks outside of it.
        is_expert: Its tokens are gathered and its result is summed by a token dispatcher.
        blocks: How many matrices W is in one along its rows (gate and up).
    """

    group: dist.ProcessGroup | None
    is_column: bool
    sequence_parallel: bool
    is_expert: bool
    blocks: int

    @classmethod
    def of(cls, linear: nn.Module, name: str = "") -> LinearLayout:
        """The layout of a linear.

        Args:
            linear: One of Megatron's parallel linears.
            name: Its name in its parent, by which the gated one is known where its weight does not
                say so.
        """
        is_column = bool(_names(type(linear)) & {*_COLUMN})
        group = getattr(linear, "_tp_group", None) or getattr(linear, "tp_group", None)
        # Transformer Engine's do without a mode where the dispatcher communicates
        mode = getattr(linear, "parallel_mode", "")
        blocks = getattr(linear.weight, "partition_stride", 1) if is_column else 1
        if name.rpartition(".")[2] == _GATED and getattr(linear.config, "gated_linear_unit", False):
            blocks = 2
        return cls(
            group=group,
            is_column=is_column,
            sequence_parallel=bool(getattr(linear, "sequence_parallel", False)),
            is_expert=bool(getattr(linear, "explicit_expert_comm", mode is None)),
            blocks=blocks,
        )

    def __deepcopy__(self, memo: object) -> LinearLayout:
        # a group of processes cannot be copied, and none of this ever changes
        return self

    @property
    def size(self) -> int:
        """Tensor parallel size."""
        return 1 if self.group is None else self.group.size()

    @property
    def weight(self) -> Shard:
        """How W is split."""
        return Shard(self.group, 0, self.blocks) if self.is_column else Shard(self.group, 1)

    @property
    def a(self) -> Shard:
        """How A is split."""
        return Shard(self.group, None if self.is_column else 1)

    @property
    def b(self) -> Shard:
        """How B is split."""
        return Shard(self.group, 0, self.blocks) if self.is_column else Shard(self.group)

    @property
    def exchange(self) -> Exchange:
        """What the ranks exchange, as the table above says."""
        column = self.is_column
        how = "expert" if self.is_expert else "sequence" if self.sequence_parallel else "whole"
        h, dh = _EXCHANGES[column, how]
        return Exchange(
            self.group,
            h=h,
            dh=dh,
            sums_a=column and how != "whole",
            sums_b=not column and how != "whole",
            splits_x=not column or how == "sequence",
            splits_y=column or how == "sequence",
        )


def mark(parameter: nn.Parameter, shard: Shard, allreduce: bool) -> None:
    """Tell Megatron's optimizer and DDP how a factor lies on the ranks, by its own attributes.

    Args:
        parameter: A or B, this rank's part.
        shard: How it is split.
        allreduce: The base weight's mark: False for experts on other ranks than those with a copy.
    """
    marks = {
        "tensor_model_parallel": shard.dim is not None,
        "partition_dim": -1 if shard.dim is None else shard.dim,
        "partition_stride": shard.blocks,
        "allreduce": allreduce,
    }
    for name, value in marks.items():
        setattr(parameter, name, value)


def is_split_by_megatron(model: nn.Module) -> bool:
    """Whether a model has one of Megatron's linears, over several ranks."""
    return any(LinearLayout.of(m).size > 1 for m in model.modules() if takes(type(m)))


def whole_numel(module: nn.Module, parameter: nn.Parameter) -> int:
    """How many numbers the whole of a parameter has, of which a module may hold a part."""
    group = getattr(module, "_tp_group", None) or getattr(module, "tp_group", None)
    is_split = parameter.dim() == 2 and _names(type(module)) & {*_COLUMN, *_ROW, _EMBEDDING}
    if group is None or not (is_split or getattr(parameter, "tensor_model_parallel", False)):
        return parameter.numel()
    return parameter.numel() * group.size()
