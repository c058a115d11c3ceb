"""The adapter's own tensors of a model, under their fully qualified names."""

from __future__ import annotations

from torch import Tensor, nn

from bridge.peft.model.participation import check_still_adapted
from bridge.peft.model.walk import adapted_modules, state_prefix, token_rows_of, unwrap
from bridge.peft.parallel.fsdp import reshard
from bridge.peft.tensors import full_tensor


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under their fully qualified names, and nothing else.

    Args:
        model: An adapted model, possibly inside `DistributedDataParallel` or compiled.

    Returns:
        `{"….q_proj.lora_a.weight": (dim, in_features), "….lora_b.weight": (out_features, dim), …}`,
        detached, sharing storage with the model; empty if nothing is adapted. Sharded tensors
        (FSDP2, Megatron's tensor parallel) are gathered whole, so every rank must call.
    """
    check_still_adapted(unwrap(model))
    reshard(model)
    found = {
        f"{state_prefix(fqn, module)}.{name}".lstrip("."): tensor
        for fqn, module in adapted_modules(model)
        for name, tensor in module.whole_parameters().items()
    }
    return found | {
        f"{fqn}.token_rows.weight".lstrip("."): full_tensor(module.rows.weight)
        for fqn, module in token_rows_of(model)
    }
