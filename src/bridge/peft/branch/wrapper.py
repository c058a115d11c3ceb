"""A base and an adapter side by side, for bases that answer with tuples (Megatron Core)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bridge.peft.tensors import full_tensor


def split_base_result(result: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Take apart what a Megatron or Transformer Engine linear returns.

    Args:
        result: `out`, `(out, None)`, `(out, bias)`, `((out, ln_out), bias or None)` or
            `(out, bias, ln_out)`; `out` is (..., out_features), `ln_out` (..., in_features).
        x: The base's input, (..., in_features).

    Returns:
        `(out, bias or None, adapter_input)`; the adapter's input is `ln_out` where there is one,
        else x, and is contiguous.

    Raises:
        TypeError: `result` has none of these forms.
    """
    bias: Tensor | None = None
    adapter_input = x
    match result:
        case Tensor():
            out = result
        case ((Tensor() as out, Tensor() as adapter_input), (Tensor() | None) as bias):
            pass
        case (Tensor() as out, (Tensor() | None) as bias, Tensor() as adapter_input):
            pass
        case (Tensor() as out, (Tensor() | None) as bias):
            pass
        case _:
            raise TypeError(
                "the wrapped module returned none of out, (out, bias), ((out, ln_out), bias), "
                f"(out, bias, ln_out): got {_describe(result)}"
            )
    return out, bias, adapter_input.contiguous()


def _describe(result: Any) -> str:
    if isinstance(result, tuple | list):
        return f"({', '.join(_describe(item) for item in result)})"
    return type(result).__name__


def _report_checkpoint_names(module: nn.Module, incompatible_keys: Any) -> None:
    # Name missing and unexpected keys as the checkpoint does, without the attribute between.
    for keys in incompatible_keys:
        keys[:] = [key.replace("to_wrap.", "") for key in keys]


class AdapterWrapper(nn.Module):
    """A base module and an adapter; subclasses say in `forward` how the two combine.

    In the state dict the base stands at the wrapper's own prefix, so a base checkpoint keeps its
    names, and the adapter under `adapter.`.

    Args:
        to_wrap: The base.
        adapter: The adapter.

    Raises:
        ValueError: The base has a child named `adapter`, whose keys would collide.
    """

    def __init__(self, to_wrap: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        if any(name.split(".")[0] == "adapter" for name in to_wrap.state_dict()):
            raise ValueError(
                f"{type(to_wrap).__name__} has state under 'adapter.', where the wrapper keeps the "
                "adapter's; rename that child"
            )
        self.to_wrap = to_wrap
        self.adapter = adapter
        self.adapter_enabled = True
        self.register_load_state_dict_post_hook(_report_checkpoint_names)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters under their names below this module."""
        return {f"adapter.{name}": p for name, p in self.adapter.named_parameters()}

    def whole_parameters(self) -> dict[str, Tensor]:
        """The adapter's parameters, whole and detached, likewise; may be a collective."""
        return {name: full_tensor(p) for name, p in self.adapter_parameters().items()}

    def base_linear_forward(
        self, x: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Run the base and take its result apart.

        Returns:
            `(linear_output, bias or None, adapter_input)`, as `split_base_result` gives them.
        """
        return split_base_result(self.to_wrap(x, *args, **kwargs), x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base's state at the wrapper's own prefix, the adapter's under `adapter.`."""
        kwargs.update(zip(("destination", "prefix", "keep_vars"), args, strict=False))
        prefix = kwargs.pop("prefix", "")
        kwargs["destination"] = self.to_wrap.state_dict(prefix=prefix, **kwargs)
        return self.adapter.state_dict(prefix=f"{prefix}adapter.", **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # `load_state_dict` looks for children by attribute name: hand the base its own.
        inner = (f"{prefix}adapter.", f"{prefix}to_wrap.")
        for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(inner)]:
            state_dict[f"{prefix}to_wrap.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _fqn_modifiers(self) -> dict[str, str]:
        # How torch.distributed.checkpoint learns that `to_wrap` stands in no name of a checkpoint.
        base = self.to_wrap
        names = {*base._parameters, *base._buffers, *base._modules, "_extra_state"}
        return dict.fromkeys(names, "to_wrap")

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Megatron Core's distributed checkpoint: the two parts' sharded dicts, merged."""
        merged: dict[str, Any] = {}
        for part, part_prefix in ((self.to_wrap, prefix), (self.adapter, f"{prefix}adapter.")):
            sharded = part.sharded_state_dict(part_prefix, sharded_offsets, metadata)  # pyright: ignore
            merged.update(sharded)
        return merged


class LoRALinear(AdapterWrapper):
    """A wrapped linear plus an adapter module: for bases that answer with tuples (Megatron Core).

    Args:
        to_wrap: The base; its `forward` may return any of the forms that
            `AdapterWrapper.base_linear_forward` understands.
        adapter: Maps (..., in_features) to (..., out_features); its scale is its own affair.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the adapter's output to the base's.

        Returns:
            `(linear_output + adapter_output, bias or None)`, or the bare sum where the base
            returns a bare tensor; in the same form while the adapter is switched off.
        """
        result = self.to_wrap(x, *args, **kwargs)
        output, bias, adapter_input = split_base_result(result, x)
        if self.adapter_enabled:
            output = output + self.adapter(adapter_input).to(output.dtype)
        return output if isinstance(result, Tensor) else (output, bias)
