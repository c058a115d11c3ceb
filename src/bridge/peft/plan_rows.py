"""The rows of a plan: what a recipe does to each module, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from bridge.peft.branch.functions.starts import is_subtracted
from bridge.peft.branch.kinds.experts import (
    PARAMETER_PATH,
    experts_per_token,
    is_attention,
    parameter_features,
)
from bridge.peft.branch.kinds.read_linear import READ
from bridge.peft.branch.options import BranchOptions
from bridge.peft.branch.patch import adapted_class
from bridge.peft.branch.quantised.table import format_of
from bridge.peft.dtypes import sound_dtype
from bridge.peft.model.adapt import PlannedTokens
from bridge.peft.ops.dispatch import ComputePath, choose_path
from bridge.peft.plan import PlanRow, TokensRow, TrainedRow
from bridge.peft.targets import Candidate
from bridge.peft.tensors import is_plain, is_sharded


def plan_row(
    candidate: Candidate,
    options: BranchOptions,
    read: Mapping[nn.Module, Sequence[nn.Module]],
) -> PlanRow:
    """The row of one module or parameter that is adapted.

    Args:
        candidate: What is adapted.
        options: Those of its branch.
        read: The modules whose weight other code reads, with the readers.
    """
    module, weight = candidate.module, candidate.weight
    if candidate.parameter:
        return _parameter_row(candidate, options)
    adapted = adapted_class(type(module))
    plain = adapted.plain_forward and (is_plain(weight) or is_sharded(weight))
    path = choose_path(weight if is_plain(weight) and plain else None, plain_linear=plain)
    if module in read:
        path = ComputePath("read", READ.replace("other code", type(read[module][0]).__name__))
    n_in, n_out = adapted.features(module)
    form = format_of(module)
    return PlanRow(
        fqn=candidate.fqn,
        base_type=type(module).__name__,
        quantised=None if form is None else form.label(module),
        in_features=n_in,
        out_features=n_out,
        dim=options.dim,
        alpha=options.alpha,
        scale=options.scale,
        subtracts=is_subtracted(options.lora_A_init_method),
        trains_a=not options.freeze_a,
        magnitudes=n_out if options.use_dora else 0,
        dtype=options.resolve_dtype(weight.dtype),
        path=path.name,
        reason=path.reason,
        trained_rows=sum(stop - start for start, stop in options.rows or ()) or n_out,
        looked_up=isinstance(module, nn.Embedding),
    )


def _parameter_row(candidate: Candidate, options: BranchOptions) -> PlanRow:
    module, weight = candidate.module, candidate.weight
    n_in, n_out = parameter_features(module, candidate.parameter)
    stack = weight.shape[0] if weight.dim() == 3 else 1
    path = PARAMETER_PATH
    if is_attention(module):
        path = ComputePath("read", READ.replace("other code", type(module).__name__))
    return PlanRow(
        fqn=candidate.fqn,
        base_type=type(module).__name__,
        in_features=n_in,
        out_features=n_out,
        dim=options.dim,
        alpha=options.alpha,
        scale=options.scale,
        dtype=options.resolve_dtype(weight.dtype),
        trains_a=not options.freeze_a,
        path=path.name,
        reason=path.reason,
        trained_rows=n_out,
        stack=stack,
        used=min(stack, experts_per_token(module)) if stack > 1 else 1,
    )


def trained_row(candidate: Candidate) -> TrainedRow:
    """The row of one module that is trained in full.

    Args:
        candidate: The module.
    """
    parameters = list(candidate.module.parameters())
    return TrainedRow(
        fqn=candidate.fqn,
        base_type=type(candidate.module).__name__,
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
    )


def tokens_row(plan: PlannedTokens) -> TokensRow:
    """The row of one embedding of which some rows are trained.

    Args:
        plan: The embedding and its tokens.
    """
    weight: Tensor = plan.module.weight  # pyright: ignore[reportAssignmentType]
    return TokensRow(
        fqn=plan.fqn,
        tokens=len(plan.tokens),
        embedding_dim=weight.shape[1],
        dtype=plan.dtype or sound_dtype(weight.dtype),
        followers=len(plan.followers),
    )
