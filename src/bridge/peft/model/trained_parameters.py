"""Base parameters that belong to an adapter as a whole, and the way back to the base's own.

An adapter file may bring a new output head or new biases. They replace the base's parameters; the
originals stay on the module, so that `disable_adapters` still gives the base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

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
from bridge.peft.parallel.fsdp import is_managed, join
from bridge.peft.tensors import is_sharded, sharded_like

_ORIGINALS = "parameters_before_adapter"


class _Tied(NamedTuple):
    """Places of one and the same parameter that get new values.

    Attributes:
        places: Module, name in it and fully qualified name of each.
        is_one: Whether all of them get the same values, so that they stay tied.
        is_untied: Whether other places keep the old values, or these get different ones.
    """

    places: list[tuple[nn.Module, str, str]]
    is_one: bool
    is_untied: bool


def check_can_be_replaced(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Raise `AdapterError` if new values would untie what FSDP2 ties again at each gathering.

    Args:
        model: The model, not wrapped.
        values: By fully qualified name.
    """
    for places, _, is_untied in _tied(model, values):
        module, name, fqn = places[0]
        if is_untied and is_managed(module) and is_sharded(module._parameters[name]):
            raise AdapterError(
                f"{fqn} shares its values with another parameter, which would keep them, and both "
                "are sharded as one; load the adapter into the whole model, then call fully_shard"
            )


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
    for places, is_one, is_untied in _tied(model, values):
        module, name, first = places[0]
        old = module._parameters[name]
        assert old is not None
        if is_one and old.requires_grad and first not in frozen and not old.is_meta:
            with torch.no_grad():  # in training already: an optimizer may hold it
                old.copy_(sharded_like(values[first].to(old.dtype), old))
            continue
        if is_untied:
            forget_tie(model)
        new: nn.Parameter | None = None
        for module, name, fqn in places:
            module.__dict__.setdefault(_ORIGINALS, {}).setdefault(name, old)
            if new is None or not is_one:
                # a copy, so that the parameter shares nothing with the caller's tensor
                copied = values[fqn].detach().to(old.device, old.dtype, copy=True)
                new = nn.Parameter(sharded_like(copied, old), requires_grad=fqn not in frozen)
            module._parameters[name] = new
    join(model, ())  # FSDP2 takes up what was replaced


def _tied(model: nn.Module, values: Mapping[str, Tensor]) -> list[_Tied]:
    """The places that get new values, by the parameter that is there now."""
    modules = {clean_fqn(fqn): module for fqn, module in model.named_modules()}
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    groups: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for fqn in values:
        owner, _, name = fqn.rpartition(".")
        groups.setdefault(id(modules[owner]._parameters[name]), []).append(
            (modules[owner], name, fqn)
        )
    found: list[_Tied] = []
    for parameter, places in groups.items():
        is_one = all(torch.equal(values[fqn], values[places[0][2]]) for _, _, fqn in places)
        found.append(_Tied(places, is_one, uses[parameter] > len(places) or not is_one))
    return found


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
    with ExitStack() as stack:
        for name, parameter in trained.items():
            original = vars(module)[_ORIGINALS][name]
            if original.is_meta:
                raise AdapterError(
                    f"the base's own {name} of a {type(module).__name__} that is trained in full "
                    "was on the meta device when the model was adapted, and never loaded; adapt "
                    "the loaded model to be able to switch the adapters off"
                )
            if is_sharded(parameter):
                assert parameter is not None
                stack.enter_context(_values_of(original, parameter))
                continue
            if parameter is not None and original.device != parameter.device:
                original.data = original.data.to(parameter.device)
            module._parameters[name] = original
            stack.callback(module._parameters.__setitem__, name, parameter)
        yield


@contextmanager
def _values_of(original: Tensor, parameter: nn.Parameter) -> Iterator[None]:
    """Within the context a sharded parameter, which FSDP2 would put back, has other values."""
    trained, wants_grad = parameter.detach().clone(), parameter.requires_grad
    if not is_sharded(original):  # it was adapted before it was sharded
        original = sharded_like(original.to(parameter.dtype), parameter)
    with torch.no_grad():
        parameter.requires_grad_(False).copy_(original)
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(trained)
        parameter.requires_grad_(wants_grad)


def has_replaced(module: nn.Module) -> bool:
    """Whether parameters of a module's own were replaced.

    Args:
        module: Any module of an adapted model.
    """
    return bool(vars(module).get(_ORIGINALS))
