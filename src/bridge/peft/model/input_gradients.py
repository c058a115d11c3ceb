"""Let what enters a model want a gradient where reentrant checkpointing needs it to.

`torch.utils.checkpoint(use_reentrant=True)` gives a block no gradient at all if none of its inputs
wants one, and in a model with a frozen base nothing before the first branch does.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft.model.weight_reads import source_mentions
from bridge.peft.parallel.megatron import is_transformer_block

#: Inputs of a model that are not activations: a mask that wants a gradient takes slower kernels.
_NOT_ACTIVATIONS = ("mask", "label")


def let_inputs_require_grad(model: nn.Module) -> None:
    """Hook the model's floating inputs and its embeddings, in place.

    In a model of transformers the hooks act while reentrant checkpointing is switched on. In
    another one, whose source speaks of checkpointing, its embeddings want a gradient in every
    training step; its inputs are left alone, since it may write into them. Of blocks that
    `checkpoint_wrapper` wraps in the reentrant way, sooner or later, the inputs do.

    Args:
        model: An adapted model, not wrapped.
    """
    hooks = _Hooks(model)
    model.register_forward_pre_hook(hooks.find_wrapped_blocks)
    if hooks.switches:
        model.register_forward_pre_hook(hooks.of_inputs, with_kwargs=True)
    elif blocks := [m for m in model.modules() if is_transformer_block(type(m))]:
        for block in blocks:  # not its embeddings, whose backward would communicate for nothing
            block.register_forward_pre_hook(hooks.of_megatron_layers, with_kwargs=True)
        return
    elif not any(source_mentions(cls, "checkpoint") for cls in _own_classes(model)):
        return
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(hooks.of_embedding)


def _own_classes(model: nn.Module) -> set[type[nn.Module]]:
    """The classes of a model's modules, of adapted ones those from before."""
    return {getattr(type(module), "base_type", type(module)) for module in model.modules()}


class _Hooks:
    """The hooks of one model; an object, so that copies and pickles of the model have their own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.switches = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]

    def find_wrapped_blocks(self, module: nn.Module, args: Any) -> None:
        """Hook the blocks that have been wrapped since the last training step."""
        # not imported: whoever has wrapped a block has imported it
        library = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
        if library is None or not self._trains():
            return
        for block in self._model.modules():
            if isinstance(block, library.CheckpointWrapper):
                reentrant = block.checkpoint_impl == library.CheckpointImpl.REENTRANT
                if reentrant and self.of_wrapped_block not in block._forward_pre_hooks.values():
                    block.register_forward_pre_hook(self.of_wrapped_block, with_kwargs=True)

    def of_wrapped_block(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Replace the floating inputs of a checkpointed block, where needed."""
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not self._trains() or any(x.requires_grad for x in tensors):
            return None
        return _all_wanting_grad(args, kwargs)

    def of_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace the model's floating inputs, where needed."""
        return _all_wanting_grad(args, kwargs) if self._are_needed() else None

    def of_embedding(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Replace an embedding's output, where needed."""
        return _wanting_grad(output) if self._are_needed() else None

    def of_megatron_layers(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace the first input of Megatron's layers, where they are recomputed in backward."""
        config: Any = module.config
        if config.recompute_granularity is None or not self._are_needed():
            return None
        if args:
            return (_wanting_grad(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _wanting_grad(kwargs["hidden_states"])}

    def _are_needed(self) -> bool:
        if self.switches and not any(_is_reentrant(module) for module in self.switches):
            return False
        return self._trains()

    def _trains(self) -> bool:
        # Compiled and transformed functions need no such help, and could not be traced through it.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        if not (self._model.training and torch.is_grad_enabled()):
            return False
        # where nothing is trained, torch's own error must come
        return any(p.requires_grad for p in self._model.parameters())


def _is_reentrant(module: nn.Module) -> bool:
    """Whether a module of transformers checkpoints, and in the reentrant way."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    options = getattr(function, "keywords", None) or {}
    return bool(module.gradient_checkpointing) and options.get("use_reentrant", True) is not False


def _all_wanting_grad(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(_wanting_grad(x) for x in args), {
        name: x if any(word in name for word in _NOT_ACTIVATIONS) else _wanting_grad(x)
        for name, x in kwargs.items()
    }


def _wanting_grad(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.requires_grad or not x.is_floating_point():
        return x
    # A copy, because the model may write into what was a leaf.
    return x.detach().requires_grad_().clone()
