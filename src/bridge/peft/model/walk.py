"""Walk a model that carries branches: inside its wrappers, and to its adapted modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from bridge.peft.branch.kinds.experts import SUFFIX, ParameterBranch
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.token_rows import TokenRows, WithTokenRows
from bridge.peft.branch.wrapper import AdapterWrapper

#: Classes that hold a model as `module` and are not part of it, by name.
_WRAPPERS = frozenset(
    (
        *("DistributedDataParallel", "DataParallel", "AveragedModel", "DeepSpeedEngine"),
        *("Float16Module", "FullyShardedDataParallel"),
    )
)
#: Levels that stand in the names of a model's own modules.
_WRAPPER_LEVELS = ("to_wrap", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside its wrappers: data parallel, compiled, averaged.

    Args:
        model: A model, possibly wrapped.
    """
    *_, inner = wrappers(model)
    return inner


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """A model's wrappers from the outermost on, and the model inside them at last.

    Args:
        model: A model, possibly wrapped.
    """
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        names = {base.__name__ for base in type(inner).__mro__}
        attribute = "module" if names & _WRAPPERS else "_orig_mod"
        found = inner._modules.get(attribute)
        inner = found if isinstance(found, nn.Module) else None


def clean_fqn(fqn: str) -> str:
    """`fqn` without the levels that wrapping a module puts in between."""
    return ".".join(part for part in fqn.split(".") if part not in _WRAPPER_LEVELS)


def some_names(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: at most five, and how many more there are.

    Args:
        names: At least one.
        most: How many to name.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, LoRAMixin | AdapterWrapper]]:
    """All adapted modules of a model, each once, with their fully qualified names.

    A branch on a parameter comes under the parameter's name.

    Args:
        model: A model, possibly inside `DistributedDataParallel` or compiled.
    """
    for fqn, module in unwrap(model).named_modules():
        if isinstance(module, ParameterBranch):
            yield clean_fqn(fqn).removesuffix(SUFFIX), module
        elif isinstance(module, LoRAMixin | AdapterWrapper):
            yield clean_fqn(fqn), module


def state_prefix(fqn: str, module: nn.Module) -> str:
    """What stands before the names of an adapted module's own parameters in a state dict.

    Args:
        fqn: As `adapted_modules` gives it.
        module: The adapted module.
    """
    return f"{fqn}{SUFFIX}" if isinstance(module, ParameterBranch) else fqn


def token_rows_of(model: nn.Module) -> Iterator[tuple[str, WithTokenRows]]:
    """The embeddings with rows of their own for some tokens, with their fully qualified names.

    What is tied to one and follows it is left out.

    Args:
        model: A model, possibly inside `DistributedDataParallel` or compiled.
    """
    for fqn, module in unwrap(model).named_modules():
        if isinstance(module, WithTokenRows) and module.followed_rows is None:
            yield clean_fqn(fqn), module


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A, B and what else is an adapter's own, under the names that the state dict gives them.

    Args:
        model: A model, possibly inside `DistributedDataParallel` or compiled.
    """
    for fqn, module in adapted_modules(model):
        for name, parameter in module.adapter_parameters().items():
            yield f"{state_prefix(fqn, module)}.{name}".lstrip("."), parameter
    for fqn, module in token_rows_of(model):
        yield f"{fqn}.token_rows.weight".lstrip("."), module.rows.weight


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the base model has or had, each once, by fully qualified name.

    Args:
        model: A model, adapted or not, not wrapped.
    """
    modules: dict[str, nn.Module] = {}
    for fqn, module in model.named_modules():
        modules.setdefault(clean_fqn(fqn), module)  # a wrapper comes before what it holds
    own = tuple(
        f"{fqn}.{child}."
        for fqn, module in modules.items()
        if isinstance(module, LoRAMixin)
        for child in ("lora_a", "lora_b", "lora_start", "lora_magnitude", "dropout", "adapter")
    ) + tuple(
        f"{fqn}."
        for fqn, module in modules.items()
        if isinstance(module, ParameterBranch | TokenRows)
    )
    return {fqn: module for fqn, module in modules.items() if not f"{fqn}.".startswith(own)}


def output_head(model: nn.Module) -> nn.Module | None:
    """What transformers' `get_output_embeddings()` answers, where there is such a thing.

    Args:
        model: A model, not wrapped.
    """
    return _asked(model, "get_output_embeddings")


def input_embedding(model: nn.Module) -> nn.Module | None:
    """What transformers' `get_input_embeddings()` answers, where there is such a thing.

    Args:
        model: A model, not wrapped.
    """
    return _asked(model, "get_input_embeddings")


def _asked(model: nn.Module, question: str) -> nn.Module | None:
    ask = getattr(model, question, None)
    try:
        answer = None if ask is None else ask()
    except (NotImplementedError, AttributeError):
        return None  # transformers' own answer where a model has none
    return answer if isinstance(answer, nn.Module) else None
