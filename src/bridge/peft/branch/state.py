"""The tensors of a branch: their names, and how they are saved, loaded and follow the base."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from bridge.peft.branch.functions.carried import CarriesFunctions
from bridge.peft.tensors import full_tensor

_LORA_KEYS = (
    *("lora_a.weight", "lora_b.weight", "lora_magnitude.weight"),
    *("lora_start.a", "lora_start.b"),
)


def without(state: Any, names: Iterable[str], *args: Any, **kwargs: Any) -> Any:
    """A state dict without some of a module's own entries, in place.

    Args:
        state: As `state_dict` of the module answers.
        names: The entries' names below the module.
        *args: Those of `state_dict`.
        **kwargs: Likewise.
    """
    prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
    for name in names:
        state.pop(prefix + name, None)
    return state


def loading_while_merged(prefix: str) -> str:
    """What loading into a merged module is refused with.

    Args:
        prefix: The module's, as `_load_from_state_dict` gets it.
    """
    return (
        f"{prefix.rstrip('.') or 'module'} is merged: loading now would be undone or doubled by "
        "unmerge; call unmerge(model) first"
    )


class KeepsState(CarriesFunctions):
    """The part of an adapted layer that knows its own tensors; the layer is the rest (`LoRAMixin`).

    Attributes:
        merged: True while the branch is folded into the base weight.
    """

    merged: bool

    def whole_parameters(self) -> dict[str, Tensor]:
        """As `adapter_parameters`, whole and detached; may be a collective."""
        own = {"lora_a.weight": self.lora_a.whole(), "lora_b.weight": self.lora_b.whole()}
        others = self.adapter_parameters()
        return own | {name: full_tensor(p) for name, p in others.items() if name not in own}

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """A, B, what is subtracted, and DoRA's magnitude, under their names below this module."""
        own = {"lora_a.weight": self.lora_a.weight, "lora_b.weight": self.lora_b.weight}
        if (start := self.start) is not None:
            own |= {"lora_start.a": start.a, "lora_start.b": start.b}
        magnitude = self.magnitude
        return own if magnitude is None else own | {"lora_magnitude.weight": magnitude.weight}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.state_dict`; while merged without A and B, which the weight then holds."""
        state = super().state_dict(*args, **kwargs)
        return without(state, _LORA_KEYS, *args, **kwargs) if self.merged else state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        error_msgs: list[str] = args[4] if len(args) > 4 else kwargs["error_msgs"]
        if self.merged:
            error_msgs.append(loading_while_merged(prefix))
            return
        follows = self.magnitude_is_the_base_s() and f"{prefix}weight" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._follow_base_off_meta()
        self.weight_was_written()
        if follows:
            self.follow_base()

    def _follow_base_off_meta(self) -> None:
        """Materialise A and B when loading with `assign=True` has materialised the base."""
        weight = getattr(self, "weight", None)
        if weight is None or weight.device.type == "meta":
            return
        for part in (self.lora_a, self.lora_b, self.start, self.magnitude):
            if part is not None and next(part.parameters()).device.type == "meta":
                part.to_empty(device=weight.device)
