"""Watch a model's first forward: a branch that takes no part, or is gone, is told by name.

A model may hand a linear's weight to a function and never call the linear; another library may
replace an adapted linear, or cast its A and B. None of that fails by itself.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.dtypes import dtype_name
from bridge.peft.errors import AdapterError
from bridge.peft.model.walk import adapted_modules, some_names
from bridge.peft.parallel.fsdp import sharded_modules
from bridge.peft.tensors import is_plain, is_sharded, write_count

_RECORD = "adapted_fqns"
#: The end of the file that holds Megatron's own checkpoint function.
_MEGATRON_CHECKPOINT = os.path.join("megatron", "core", "tensor_parallel", "random.py")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def watch_first_forward(model: nn.Module, layers: Mapping[str, LoRAMixin]) -> None:
    """Remember what was adapted, and look at the model's first forward; then every hook is gone.

    Args:
        model: The adapted model, not wrapped.
        layers: Its adapted layers by fully qualified name.
    """
    setattr(model, _RECORD, tuple(layers))
    Watch(model, layers)


def takes_no_part(layer: LoRAMixin) -> bool:
    """Whether the model ran, the layer's part of it too, and the layer did not.

    Args:
        layer: An adapted layer.
    """
    watch = getattr(layer.on_call, "__self__", None)
    return layer.bypassed or (isinstance(watch, Watch) and watch.was_passed_by(layer))


def check_still_adapted(model: nn.Module) -> None:
    """Raise if a layer that was adapted has been replaced since.

    Args:
        model: A model, or one that holds an adapted one.

    Raises:
        AdapterError: Another library put a module of its own in a layer's place.
    """
    for root in model.modules():
        recorded = vars(root).get(_RECORD, ())
        present = dict(adapted_modules(root)) if recorded else {}
        for fqn in recorded:
            if fqn not in present and (now := _module(root, fqn)) is not None:
                raise AdapterError(
                    f"{fqn} was adapted and is a {type(now).__name__} now: another library has "
                    "replaced it and lost its adapter; convert the model first, then adapt it"
                )


class Watch:
    """The hooks of one model's first forward; an object, so that copies of the model have theirs.

    A layer is bypassed if the module that holds it ran and the layer did not. One that is
    idle with its holder (an expert that no token chose, a tower without input) is not.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, LoRAMixin]) -> None:
        self._layers = dict(layers)
        self._waiting = {layer: fqn for fqn, layer in layers.items()}
        self._dtypes = {layer: layer.branch_dtype for layer in layers.values()}
        self._ran: set[nn.Module] = set()
        self._versions: dict[LoRAMixin, tuple[Tensor, int]] = {}
        self._buffers: dict[str, int] = {}
        self._wants_grad = False
        self._untrainable: list[str] = []
        self._frozen = {fqn for fqn, p in model.named_parameters() if not p.requires_grad}
        self._holders = {layer: _holder(model, fqn) for fqn, layer in layers.items()}
        self._handles = [
            holder.register_forward_pre_hook(self._saw)
            for holder in dict.fromkeys(self._holders.values())
        ]
        self._handles.append(model.register_forward_pre_hook(self._begin))
        self._handles.append(model.register_forward_hook(self._end))
        for layer in layers.values():
            layer.on_call = self._called

    def _begin(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            check_still_adapted(model)
            self._wants_grad = torch.is_grad_enabled()
            weights = {m: m.base_weight for m in self._layers.values()}
            self._versions = {m: (weight, write_count(weight)) for m, weight in weights.items()}
            self._buffers = _buffer_versions(model) if model.training else {}

    def _saw(self, holder: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._ran.add(holder)

    def _called(self, layer: LoRAMixin) -> None:
        fqn = self._waiting.pop(layer, None)
        if fqn and self._wants_grad and not torch.is_grad_enabled() and not _in_checkpoint():
            self._untrainable.append(fqn)
        layer.on_call, layer.bypassed = None, False

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.stop()
        bypassed = [layer for layer in self._waiting if self._is_bypassed(layer)]
        for layer in bypassed:
            layer.bypassed = True
        if bypassed:
            self._warn_bypassed(bypassed)
        if self._untrainable:
            warnings.warn(
                f"{some_names(self._untrainable)}: computed under torch.no_grad() by the model, so "
                "A and B get no gradient; leave them out with exclude_modules",
                stacklevel=2,
            )
        self._warn_written()
        self._warn_buffers(model)
        self._warn_unfrozen(model)
        self._warn_cast(model)

    def stop(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def was_passed_by(self, layer: LoRAMixin) -> bool:
        """Whether a layer waits, before any full forward, though others beside it were called."""
        if not self._handles or layer not in self._waiting:
            return False
        holder = self._holders[layer]
        experts = _siblings(holder, layer)
        beside = (m for m, h in self._holders.items() if h is holder and m not in experts)
        return any(m not in self._waiting for m in beside)

    def _warn_buffers(self, model: nn.Module) -> None:
        now = _buffer_versions(model)
        changed = [f for f, version in self._buffers.items() if now.get(f, version) > version]
        if names := list(dict.fromkeys(f.rpartition(".")[0] or "the model" for f in changed)):
            warnings.warn(
                f"{some_names(names)}: training changes their buffers (running statistics), which "
                "belong to the base and are not saved with the adapter; call .eval() on them after "
                "model.train()",
                stacklevel=2,
            )

    def _warn_unfrozen(self, model: nn.Module) -> None:
        # torch's SequenceParallel puts new parameters in the place of a norm's, and forgets this;
        # one that is whole was unfrozen by the user
        unfrozen = [
            fqn
            for fqn, p in model.named_parameters()
            if p.requires_grad and fqn in self._frozen and is_sharded(p)
        ]
        if unfrozen:
            warnings.warn(
                f"{some_names(unfrozen)}: frozen by the recipe, and trainable since the model was "
                "sharded; call .requires_grad_(False) on them and make the optimizer again, or "
                "shard the model first and adapt it then",
                stacklevel=2,
            )

    def _warn_written(self) -> None:
        # FSDP2 may have put another tensor into a weight's place since
        written = [
            fqn
            for fqn, layer in self._layers.items()
            for weight, version in [self._versions[layer]]
            if layer.base_weight is weight and write_count(weight) > version
        ]
        self._versions = {}
        if written:
            warnings.warn(
                f"{some_names(written)}: the model's forward writes into the base weight, and the "
                "branch beside it stays as it is; leave them out with exclude_modules, or switch "
                "that off in the model's config (RWKV: rescale_every=0)",
                stacklevel=2,
            )

    def _is_bypassed(self, layer: LoRAMixin) -> bool:
        holder = self._holders[layer]
        siblings = _siblings(holder, layer)
        idle_expert = any(isinstance(s, LoRAMixin) and s not in self._waiting for s in siblings)
        # one that is compiled by itself is called within its graph, which tells nobody
        is_compiled = layer._compiled_call_impl is not None
        return holder in self._ran and not idle_expert and not is_compiled

    def _warn_bypassed(self, bypassed: list[LoRAMixin]) -> None:
        names = [self._waiting[layer] for layer in bypassed]
        warnings.warn(
            f"{len(names)} of {len(self._layers)} adapted linears were not called in the model's "
            f"first forward, though the module around them was: {some_names(names)}. Unused, or "
            "their weight is read past the adapter: they have no effect and get no gradient; "
            "leave them out with exclude_modules",
            stacklevel=2,
        )

    def _warn_cast(self, model: nn.Module) -> None:
        # FSDP2 computes in its policy's dtype with copies that it puts into their place
        gathered = bool(sharded_modules(model))
        cast = {
            fqn: layer
            for fqn, layer in self._layers.items()
            if layer.branch_dtype != self._dtypes[layer]
            and not (gathered and is_plain(layer.lora_a.weight))
        }
        if not cast:
            return
        layer = next(iter(cast.values()))
        if self._dtypes[layer].itemsize > layer.branch_dtype.itemsize:
            warnings.warn(
                f"A and B of {len(cast)} layers were made in {dtype_name(self._dtypes[layer])} and "
                f"cast to {dtype_name(layer.branch_dtype)} since, in which small steps are lost; "
                "cast the model before adapting it, or A and B back",
                stacklevel=2,
            )


def _buffer_versions(model: nn.Module) -> dict[str, int]:
    """The versions of the buffers that a checkpoint of the base holds."""
    return {
        f"{fqn}.{name}": write_count(buffer)
        for fqn, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _in_checkpoint() -> bool:
    """Whether this is the first pass of a reentrant checkpoint, whose second pass has gradients."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file == checkpoint.__code__.co_filename or file.endswith(_MEGATRON_CHECKPOINT):
            return True
        frame = frame.f_back
    return False


def _module(root: nn.Module, fqn: str) -> nn.Module | None:
    try:
        return root.get_submodule(fqn)
    except AttributeError:
        return None


def _holder(model: nn.Module, fqn: str) -> nn.Module:
    """The nearest module around a layer that has a forward of its own; the model at last."""
    parts = fqn.split(".")
    for end in range(len(parts) - 1, 0, -1):
        around = _module(model, ".".join(parts[:end]))
        if around is not None and not isinstance(around, _CONTAINERS):
            return around
    return model


def _siblings(holder: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The other items of the list that holds a layer, if one does."""
    for module in holder.modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and layer in module.children():
            return [child for child in module.children() if child is not layer]
    return []
