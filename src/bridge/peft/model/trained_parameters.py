"""Base parameters that were trained whole beside the adapter, and the way back to the base's own.

An adapter file may bring a new output head or new biases. They replace the base's parameters; the
originals stay on the module, so that `disable_adapters` still gives the base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.wrapper import AdapterWrapper
from bridge.peft.model.walk import clean_fqn

_ORIGINALS = "parameters_before_adapter"


def replace_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give base parameters new, trainable values, in place; a tied parameter is untied.

    Args:
        model: The model, not wrapped.
        values: By fully qualified name, of the parameters' shapes; cast to their dtypes.
    """
    modules = {clean_fqn(fqn): module for fqn, module in model.named_modules()}
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for fqn, value in values.items():
        owner, _, name = fqn.rpartition(".")
        module = modules[owner]
        old = module._parameters[name]
        assert old is not None
        if uses[id(old)] > 1:
            forget_tie(model)
        module.__dict__.setdefault(_ORIGINALS, {}).setdefault(name, old)
        # a copy, so that the parameter shares nothing with the caller's tensor
        new = value.detach().to(old.device, old.dtype, copy=True)
        module._parameters[name] = nn.Parameter(new, requires_grad=True)


def forget_tie(model: nn.Module) -> None:
    """Say in the model's config that head and embedding differ, or saving would tie them again.

    Args:
        model: The model, not wrapped.
    """
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # pyright: ignore[reportOptionalMemberAccess]


def trained_whole(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """The parameters that belong to what was trained and are not an adapter's own.

    Args:
        model: An adapted model, not wrapped.

    Returns:
        Every base parameter that is trainable or was replaced, with its module, by name.
    """
    found: dict[str, tuple[nn.Module, nn.Parameter]] = {}
    own: set[int] = set()
    for module in model.modules():
        if isinstance(module, LoRAMixin | AdapterWrapper):
            own.update(id(p) for p in module.adapter_parameters().values())
    for fqn, module in model.named_modules():
        replaced = vars(module).get(_ORIGINALS, {})
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in own:
                continue
            if parameter.requires_grad or name in replaced:
                found[f"{clean_fqn(fqn)}.{name}".lstrip(".")] = (module, parameter)
    return found


@contextmanager
def original_parameters(model: nn.Module) -> Iterator[None]:
    """Within the context, replaced parameters are the base's own again.

    Args:
        model: A model, not wrapped.
    """
    replaced = [
        (module, name, module._parameters[name], original)
        for module in model.modules()
        for name, original in vars(module).get(_ORIGINALS, {}).items()
    ]
    for module, name, trained, original in replaced:
        if trained is not None and original.device != trained.device:
            original.data = original.data.to(trained.device)
        module._parameters[name] = original
    try:
        yield
    finally:
        for module, name, trained, _ in replaced:
            module._parameters[name] = trained
