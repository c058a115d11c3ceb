"""Base parameters that belong to an adapter as a whole, and the way back to the base's own.

An adapter file may bring a new output head or new biases. They replace the base's parameters; the
originals stay on the module, so that `disable_adapters` still gives the base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bridge.peft.branch.token_rows import WithTokenRows
from bridge.peft.errors import AdapterError
from bridge.peft.model.pretrained import random_modules
from bridge.peft.model.walk import (
    adapter_parameters,
    clean_fqn,
    input_embedding,
    output_head,
    some_names,
    token_rows_of,
)
from bridge.peft.tensors import sharded_like

_ORIGINALS = "parameters_before_adapter"


def replace_parameters(
    model: nn.Module, values: Mapping[str, Tensor], frozen: Collection[str] = ()
) -> None:
    """Give base parameters new values, in place.

    Tied parameters stay tied where all of them get one and the same value.

    Args:
        model: The model, not wrapped.
        values: By fully qualified name, of the parameters' shapes; cast to their dtypes.
        frozen: Names of those that are not trained further.
    """
    modules = {clean_fqn(fqn): module for fqn, module in model.named_modules()}
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    groups: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for fqn in values:
        owner, _, name = fqn.rpartition(".")
        groups.setdefault(id(modules[owner]._parameters[name]), []).append(
            (modules[owner], name, fqn)
        )
    for group in groups.values():
        module, name, first = group[0]
        old = module._parameters[name]
        assert old is not None
        is_one = all(torch.equal(values[fqn], values[first]) for _, _, fqn in group)
        if is_one and old.requires_grad and first not in frozen and not old.is_meta:
            with torch.no_grad():  # in training already: an optimizer may hold it
                old.copy_(sharded_like(values[first].to(old.dtype), old))
            continue
        if uses[id(old)] > len(group) or not is_one:
            forget_tie(model)
        new: nn.Parameter | None = None
        for module, name, fqn in group:
            module.__dict__.setdefault(_ORIGINALS, {}).setdefault(name, old)
            if new is None or not is_one:
                # a copy, so that the parameter shares nothing with the caller's tensor
                copied = values[fqn].detach().to(old.device, old.dtype, copy=True)
                new = nn.Parameter(sharded_like(copied, old), requires_grad=fqn not in frozen)
            module._parameters[name] = new


def check_can_be_trained(fqn: str, module: nn.Module) -> None:
    """Raise `AdapterError` if a module has state that is no parameter, which is not saved.

    Args:
        fqn: Its fully qualified name, for the message.
        module: A module to train in full.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if buffers := [name for name in module.state_dict() if name not in parameters]:
        raise AdapterError(
            f"{fqn} has buffers ({some_names(buffers)}), which are not saved with an adapter; name "
            "the modules inside it that have parameters only"
        )


def train_in_full(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Give modules trainable copies of their parameters, in place; tied ones stay tied.

    Args:
        model: The model, not wrapped.
        modules: Modules of it.
    """
    copies = {
        id(p): nn.Parameter(p.detach().clone()) for module in modules for p in module.parameters()
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in copies:
                vars(module).setdefault(_ORIGINALS, {}).setdefault(name, parameter)
                module._parameters[name] = copies[id(parameter)]


def forget_tie(model: nn.Module) -> None:
    """Say in the model's config that head and embedding differ, or saving would tie them again.

    Args:
        model: The model, not wrapped.
    """
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False  # pyright: ignore[reportOptionalMemberAccess]


def trained_whole(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """The parameters that belong to what was trained and are not an adapter's own.

    Args:
        model: An adapted model, not wrapped.

    Returns:
        Every base parameter that is trainable or was replaced, with its module, by name.
    """
    found: dict[str, tuple[nn.Module, nn.Parameter]] = {}
    own = {id(parameter) for _, parameter in adapter_parameters(model)}
    for fqn, module in model.named_modules():
        replaced = vars(module).get(_ORIGINALS, {})
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in own:
                continue
            if parameter.requires_grad or name in replaced:
                found[f"{clean_fqn(fqn)}.{name}".lstrip(".")] = (module, parameter)
    return found


def lost_with_the_base(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the base's checkpoint cannot give again: random, or of a new vocabulary.

    Args:
        model: A model, not wrapped.

    Returns:
        By fully qualified name.
    """
    found = random_modules(model)
    names = {module: clean_fqn(fqn) for fqn, module in model.named_modules()}
    ends = [m for m in (input_embedding(model), output_head(model)) if m is not None]
    new = _new_tokens(model)
    found |= {names[module]: module for module in ends} if new else {}
    if new and any(new <= {*module.rows.tokens} for _, module in token_rows_of(model)):
        # the adapter has the new rows, and the base's checkpoint the others
        return {fqn: m for fqn, m in found.items() if not isinstance(m, WithTokenRows)}
    return found


def _new_tokens(model: nn.Module) -> set[int]:
    """The tokens that came, or went, with resizing since loading, as the base's config tells."""
    config, embedding = getattr(model, "config", None), input_embedding(model)
    path = getattr(config, "_name_or_path", None)
    if not path or not isinstance(embedding, nn.Embedding):
        return set()
    try:
        base = type(config).from_pretrained(path, local_files_only=True)  # pyright: ignore
        size = base.get_text_config().vocab_size
    except Exception:  # no such file here, or a config of another kind: nothing is known
        return set()
    return {*range(*sorted((size, embedding.weight.shape[0])))}


@contextmanager
def original_parameters(module: nn.Module) -> Iterator[None]:
    """Within the context, a module's replaced parameters are the base's own again.

    Args:
        module: Any module of an adapted model.
    """
    trained = {name: module._parameters[name] for name in vars(module).get(_ORIGINALS, {})}
    for name, parameter in trained.items():
        original = vars(module)[_ORIGINALS][name]
        if parameter is not None and original.device != parameter.device:
            original.data = original.data.to(parameter.device)
        module._parameters[name] = original
    try:
        yield
    finally:
        module._parameters.update(trained)
