"""Adapt some modules of a model in place, and tell the model's surroundings about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from bridge.peft.branch.kinds.parameter_holder import ParameterHolder, patch_parameter
from bridge.peft.branch.kinds.read_linear import hook_reader
from bridge.peft.branch.mixin import LoRAMixin, Start
from bridge.peft.branch.options import BranchOptions
from bridge.peft.branch.patch import add_branch, take_branch_off
from bridge.peft.branch.token_rows import WithTokenRows, give_token_rows, take_token_rows_off
from bridge.peft.dtypes import sound_dtype
from bridge.peft.errors import AdapterError, AlreadyAdaptedError
from bridge.peft.model.encoder_fast_path import keep_encoders_off_fast_path
from bridge.peft.model.input_gradients import let_inputs_require_grad
from bridge.peft.model.participation import watch_first_forward
from bridge.peft.model.pretrained import (
    prepare_pretrained,
    random_modules,
    remember_random_modules,
)
from bridge.peft.model.trained_parameters import train_in_full
from bridge.peft.model.walk import adapted_modules, output_head, token_rows_of, wrappers
from bridge.peft.model.weight_reads import read_weights
from bridge.peft.parallel.fsdp import check_can_join, join, reshard


class Planned(NamedTuple):
    """One module, or one parameter of a module, to adapt.

    Attributes:
        fqn: Its fully qualified name.
        module: The module.
        options: The options of its branch.
        start: What the branch starts from.
        parameter: The parameter's name in the module; empty for the module as a whole.
    """

    fqn: str
    module: nn.Module
    options: BranchOptions
    start: Start
    parameter: str = ""


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
    if any(_is_data_parallel(type(level)) for level in wrappers(model)):
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


def _is_data_parallel(cls: type[nn.Module]) -> bool:
    """Whether this is torch's `DistributedDataParallel`, or Megatron's, told by its name."""
    return cls.__name__ == "DistributedDataParallel" or issubclass(cls, DistributedDataParallel)


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
    check_can_join(model, [module for _, module, *_ in planned])
    reshard(model)  # what is frozen and replaced now must be the parameters, not gathered copies
    random = random_modules(model)
    read = read_weights(model)
    if (head := output_head(model)) is not None:  # which trainers read for a loss without logits
        read.setdefault(head, []).append(model)
    wanted_grad = [p for p in model.parameters() if p.requires_grad]
    layers: dict[str, LoRAMixin] = {}
    embeddings: list[WithTokenRows] = []
    try:
        model.requires_grad_(False)
        for fqn, module, options, start, parameter in planned:
            if parameter:
                layers[fqn] = patch_parameter(module, parameter, options, start)
                continue
            layer = add_branch(module, options, start, is_read=module in read, name=fqn)
            layers[fqn] = layer
            put_in_place_of(model, module, layer)
        for plan in tokens:
            embeddings.append(_give_rows(plan))
        train_in_full(model, trained)  # copies all before it changes anything
        join(model, [place for layer in layers.values() for place in _places(layer)])
    except BaseException:
        for plan, _ in zip(tokens, embeddings, strict=False):
            for module in (plan.module, *plan.followers):
                assert isinstance(module, WithTokenRows)
                take_token_rows_off(module)
        _undo(model, layers.values(), wanted_grad)
        raise
    changed = [p.module for p in planned] + [m for p in tokens for m in (p.module, *p.followers)]
    for reader in {r for module in changed for r in read.get(module, ())}:
        if not isinstance(reader, ParameterHolder):  # which tells by itself
            hook_reader(reader)
    let_inputs_require_grad(model)
    keep_encoders_off_fast_path(model)
    prepare_pretrained(model)
    remember_random_modules(model, random)
    watch_first_forward(model, layers)


def _give_rows(plan: PlannedTokens) -> WithTokenRows:
    embedding = plan.module
    assert isinstance(embedding, nn.Embedding)
    dtype = plan.dtype or sound_dtype(embedding.weight.dtype)
    return give_token_rows(embedding, plan.tokens, plan.followers, dtype=dtype, values=plan.values)


def _places(layer: LoRAMixin) -> Iterator[tuple[nn.Module, str]]:
    """Where a branch's own parameters are."""
    for name in layer.adapter_parameters():
        owner, _, last = name.rpartition(".")
        yield layer.get_submodule(owner), last


def put_in_place_of(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Make every module of a model that holds `old` as a child hold `new`, in place.

    Args:
        model: The model, not wrapped.
        old: A module below it.
        new: What stands in its place; the same object where nothing is to be done.
    """
    if new is old:
        return
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


def _undo(
    model: nn.Module, layers: Iterable[LoRAMixin], wanted_grad: Iterable[nn.Parameter]
) -> None:
    for layer in layers:
        put_in_place_of(model, layer, take_branch_off(layer))
    for parameter in wanted_grad:
        parameter.requires_grad_(True)
