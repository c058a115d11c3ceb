"""The adapter alone in Megatron's distributed checkpoints: `adapter_sharded_state_dict`."""

from __future__ import annotations

from typing import Any

from torch import nn

from bridge.peft.model.walk import adapted_modules, unwrap


def adapter_sharded_state_dict(
    model: nn.Module, metadata: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What `model.sharded_state_dict()` holds of the adapter, and nothing of the base.

    Args:
        model: An adapted model of Megatron Core, possibly in its wrappers.
        metadata: Passed on, as Megatron's `dist_checkpointing` wants it.

    Returns:
        `ShardedTensor`s by fully qualified name, for `dist_checkpointing.save` and `load`.
    """
    root = unwrap(model)
    own = {
        f"{fqn}.{name}"
        for fqn, layer in adapted_modules(root)
        for name in layer.adapter_parameters()
    }
    sharded: dict[str, Any] = root.sharded_state_dict(metadata=metadata)  # pyright: ignore
    return {name: tensor for name, tensor in sharded.items() if name in own}
