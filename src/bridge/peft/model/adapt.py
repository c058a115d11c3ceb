"""Adapt some modules of a model in place, and tell the model's surroundings about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from bridge.peft.branch.kinds.read_linear import hook_reader
from bridge.peft.branch.mixin import LoRAMixin, Start
from bridge.peft.branch.options import BranchOptions
from bridge.peft.branch.patch import patch_in_place, take_branch_off
from bridge.peft.branch.token_rows import WithTokenRows, give_token_rows, take_token_rows_off
from bridge.peft.dtypes import sound_dtype
from bridge.peft.errors import AdapterError, AlreadyAdaptedError
from bridge.peft.model.encoder_fast_path import keep_encoders_off_fast_path
from bridge.peft.model.input_gradients import let_inputs_require_grad
from bridge.peft.model.participation import watch_first_forward
from bridge.peft.model.pretrained import prepare_pretrained
from bridge.peft.model.trained_parameters import train_in_full
from bridge.peft.model.walk import adapted_modules, output_head, token_rows_of, wrappers
from bridge.peft.model.weight_reads import read_weights


class Planned(NamedTuple):
    """One module to adapt.

    Attributes:
        fqn: Its fully qualified name.
        module: The module.
        options: The options of its branch.
        start: What the branch starts from.
    """

    fqn: str
    module: nn.Module
    options: BranchOptions
    start: Start


class PlannedTokens(NamedTuple):
    """Some tokens of one embedding, whose rows are trained.

    Attributes:
        fqn: The embedding's fully qualified name.
        module: The embedding.
        tokens: In ascending order, each once.
        followers: What is tied to it.
        values: (count, embedding_dim), to start from; None starts from the base's own rows.
        dtype: Of the rows; None is float32 over a half-precision base, else the base's.
    """

    fqn: str
    module: nn.Module
    tokens: tuple[int, ...]
    followers: tuple[nn.Module, ...]
    values: Tensor | None = None
    dtype: torch.dtype | None = None


def check_can_be_adapted(model: nn.Module) -> None:
    """Raise if a model must not be adapted as it is; touches nothing.

    Args:
        model: A base model, possibly wrapped.

    Raises:
        AdapterError: It is inside `DistributedDataParallel`, which knows only the parameters
            that were there when it was made.
        AlreadyAdaptedError: It carries adapters, ours or PEFT's.
    """
    if any(isinstance(level, DistributedDataParallel) for level in wrappers(model)):
        raise AdapterError(
            "the model is inside DistributedDataParallel, which would not synchronise A and B "
            "added now; adapt the model first, then wrap it"
        )
    if adapted := next(adapted_modules(model), None):
        raise AlreadyAdaptedError(
            f"the model already carries adapters (first: {adapted[0] or type(model).__name__}); "
            "start from the base model, or go on with the adapter it has"
        )
    if given := next(token_rows_of(model), None):
        raise AlreadyAdaptedError(
            f"the model already has trained token rows ({given[0]}); start from the base model"
        )
    for fqn, module in model.named_modules():
        if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
            raise AdapterError(
                f"{fqn or 'the model'} is a {type(module).__name__}, whose shape is not known yet; "
                "run one forward of the model first"
            )
        if type(module).__module__.startswith("peft."):
            raise AlreadyAdaptedError(
                f"the model already carries an adapter of PEFT ({fqn or 'the model itself'} is a "
                f"{type(module).__name__}); call its merge_and_unload(), or load the base model"
            )


def adapt_in_place(
    model: nn.Module,
    planned: Sequence[Planned],
    trained: Iterable[nn.Module] = (),
    tokens: Sequence[PlannedTokens] = (),
) -> None:
    """Freeze a model and adapt some of its modules, in place; on an error nothing has changed.

    Args:
        model: The base model, not wrapped.
        planned: The modules to adapt; that they can be was checked before.
        trained: Modules that are trained in full beside the branches.
        tokens: Token rows that are trained beside them; that they can be was checked before.
    """
    read = read_weights(model)
    if (head := output_head(model)) is not None:  # which trainers read for a loss without logits
        read.setdefault(head, []).append(model)
    wanted_grad = [p for p in model.parameters() if p.requires_grad]
    layers: dict[str, LoRAMixin] = {}
    embeddings: list[WithTokenRows] = []
    try:
        model.requires_grad_(False)
        for fqn, module, options, start in planned:
            layers[fqn] = patch_in_place(module, options, start, is_read=module in read)
        for plan in tokens:
            embeddings.append(_give_rows(plan))
        train_in_full(model, trained)  # copies all before it changes anything
    except BaseException:
        for plan, _ in zip(tokens, embeddings, strict=False):
            for module in (plan.module, *plan.followers):
                assert isinstance(module, WithTokenRows)
                take_token_rows_off(module)
        _undo(layers.values(), wanted_grad)
        raise
    changed = [p.module for p in planned] + [m for p in tokens for m in (p.module, *p.followers)]
    for reader in {r for module in changed for r in read.get(module, ())}:
        hook_reader(reader)
    let_inputs_require_grad(model)
    keep_encoders_off_fast_path(model)
    prepare_pretrained(model)
    watch_first_forward(model, layers)


def _give_rows(plan: PlannedTokens) -> WithTokenRows:
    embedding = plan.module
    assert isinstance(embedding, nn.Embedding)
    dtype = plan.dtype or sound_dtype(embedding.weight.dtype)
    return give_token_rows(embedding, plan.tokens, plan.followers, dtype=dtype, values=plan.values)


def _undo(layers: Iterable[LoRAMixin], wanted_grad: Iterable[nn.Parameter]) -> None:
    for layer in layers:
        take_branch_off(layer)
    for parameter in wanted_grad:
        parameter.requires_grad_(True)
