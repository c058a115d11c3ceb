"""Chosen token rows of an embedding, trained in place of the base's; what is tied to it follows.

    embed_tokens.weight               W, (num_embeddings, embedding_dim), frozen
    embed_tokens.token_rows.weight    the new rows, (count, embedding_dim)

The rows are values, not differences (PEFT calls them `trainable_tokens_delta` all the same): the
rows of tokens that were added to a vocabulary are random in every copy of the base.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bridge.peft.branch.kinds.embedding import lookup_of
from bridge.peft.branch.kinds.read_linear import is_being_read
from bridge.peft.branch.patch import show_forward
from bridge.peft.branch.state import loading_while_merged, without
from bridge.peft.branch.untouched import check_untouched
from bridge.peft.dtypes import TRAINABLE_DTYPES
from bridge.peft.errors import UnsupportedLinearError
from bridge.peft.ops.token_rows import looked_up, projected, replaced_rows_reference
from bridge.peft.tensors import is_plain, is_sharded

#: What this adds to a module, which must be free before.
_ATTRIBUTES = ("token_rows", "followed_rows", "adapter_enabled", "merged", "unmerged_rows")


class TokenRows(nn.Module):
    """The new rows of some tokens.

    Attributes:
        weight: (count, embedding_dim), trainable.
        tokens: Which tokens, in ascending order.
        is_set: False while the rows have no values: made on `meta`, and no base loaded since.

    Args:
        tokens: In ascending order, each once.
        width: embedding_dim.
    """

    weight: nn.Parameter
    indices: Tensor

    def __init__(
        self, tokens: Sequence[int], width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.tokens = tuple(tokens)
        self.weight = nn.Parameter(
            torch.full((len(tokens), width), torch.nan, device=device, dtype=dtype)
        )
        self.register_buffer("indices", torch.tensor(self.tokens, device=device), persistent=False)
        self.is_set = False

    @torch.no_grad()
    def set_to(self, values: Tensor) -> None:
        """Give the rows values, in place; on `meta` they keep having none.

        Args:
            values: (count, embedding_dim).
        """
        if not self.weight.is_meta and not values.is_meta:
            self.weight.copy_(values)
            self.is_set = True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}weight" in state_dict:
            self.is_set = not self.weight.is_meta
            self.indices = self.indices_on(self.weight.device)

    def indices_on(self, device: torch.device) -> Tensor:
        """The tokens as a tensor, (count,)."""
        return torch.tensor(self.tokens, device=device)

    def follow(self, base: Tensor) -> None:
        """Leave `meta`, in place, where the base has left it; the values are the base's own.

        Args:
            base: W.
        """
        if self.weight.is_meta and not base.is_meta:
            self.to_empty(device=base.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to_empty` after `meta` would leave whatever the memory held before.
        was_meta = self.weight.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.weight.is_meta:
            self.indices = self.indices_on(self.weight.device)
            with torch.no_grad():
                self.weight.fill_(torch.nan)
        return self

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{len(self.tokens)} tokens, {self.weight.shape[1]}"


class WithTokenRows(nn.Module):
    """An embedding, or what is tied to it, with some rows in place of the base's.

    Attributes:
        token_rows: The rows, where the module has its own.
        followed_rows: Those of the embedding that the module is tied to, and no child of it; None
            where it has its own.
        adapter_enabled: False while they are switched off; see `disable_adapters`.
        merged: True while the rows are written into the base weight.
        unmerged_rows: The base's rows from before that, on the CPU, if they were kept.
    """

    token_rows: TokenRows
    followed_rows: tuple[TokenRows] | None
    adapter_enabled: bool
    merged: bool
    unmerged_rows: Tensor | None
    _base_is_running = False

    #: The class before; its forward does the base's work.
    base_type: ClassVar[type[nn.Module]]

    @property
    def rows(self) -> TokenRows:
        """The rows, with values wherever the base has some."""
        rows = self._modules.get("token_rows") if self.followed_rows is None else None
        rows = rows or (self.followed_rows or (None,))[0]
        assert isinstance(rows, TokenRows)
        if not rows.is_set:
            base = self.base_weight
            rows.follow(base)
            rows.set_to(base.detach()[rows.indices] if not base.is_meta else base)
        return rows

    @property
    def base_weight(self) -> Tensor:
        """W, (num_embeddings, embedding_dim)."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """W, the parameter; while one of its readers runs, W with the new rows in it."""
        base = self.base_weight
        is_off = self.merged or not self.adapter_enabled or base.is_meta
        if is_off or self._base_is_running or not is_being_read():
            return base
        return replaced_rows_reference(base, self.rows.weight, self.rows.indices)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's own forward, with the chosen tokens' rows in place of its own.

        Args:
            x: Indices of tokens for an embedding, (..., embedding_dim) for a head.
            *args: Passed on to the base.
            **kwargs: Passed on to the base.
        """
        self._base_is_running = True
        try:
            out = super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self._base_is_running = False
        if self.merged or not self.adapter_enabled:
            return out
        rows = self.rows
        if isinstance(self, nn.Embedding):
            factor = lookup_of(self).factor
            return looked_up(out, x, rows.weight, rows.indices, factor)
        assert isinstance(self, nn.Linear)
        out = out if self.base_type.forward is nn.Linear.forward else out.clone()
        return projected(out, x, rows.weight, rows.indices, self.bias)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.state_dict`; while merged without the rows, which the weight then holds."""
        state = super().state_dict(*args, **kwargs)
        return without(state, ["token_rows.weight"], *args, **kwargs) if self.merged else state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.merged:
            error_msgs: list[str] = args[4] if len(args) > 4 else kwargs["error_msgs"]
            error_msgs.append(loading_while_merged(prefix))
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.followed_rows is None and not self.base_weight.is_meta:
            self.token_rows.follow(self.base_weight)  # before an optimizer takes them

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{super().extra_repr()}, {len(self.rows.tokens)} rows of its own"


def token_rows_refusal(module: nn.Module, *, leads: bool) -> str | None:
    """Why a module cannot have rows of some tokens in place of the base's; None if it can.

    Args:
        module: It is not touched.
        leads: Whether it is the embedding; else it is tied to one.
    """
    if not isinstance(module, nn.Embedding if leads else nn.Embedding | nn.Linear):
        return "it is not an embedding"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its forward rescales rows of its weight in place (max_norm)"
    check_untouched(module)
    weight = module._parameters.get("weight")
    if is_sharded(weight):
        return (
            "its weight is sharded; adapt the model first and shard it then (finetune: --parallel "
            "ddp or fsdp)"
        )
    if weight is None or not is_plain(weight) or weight.dtype not in TRAINABLE_DTYPES:
        return "its weight is quantised or computed from others; leave its tokens out"
    if taken := [name for name in _ATTRIBUTES if hasattr(module, name)]:
        return f"its own attribute {taken[0]!r} would be overwritten"
    return None


def give_token_rows(
    embedding: nn.Embedding,
    tokens: Sequence[int],
    followers: Sequence[nn.Module] = (),
    *,
    dtype: torch.dtype,
    values: Tensor | None = None,
) -> WithTokenRows:
    """Give an embedding trainable rows for some tokens, in place; what is tied to it follows.

    Args:
        embedding: Its weight is frozen.
        tokens: In ascending order, each once.
        followers: Embeddings and linears that hold the same weight.
        dtype: Of the rows.
        values: (count, embedding_dim), to start from; None starts from the base's own.

    Raises:
        UnsupportedLinearError: One of the modules cannot have such rows.
    """
    for module in (embedding, *followers):
        if reason := token_rows_refusal(module, leads=module is embedding):
            raise UnsupportedLinearError(f"no token rows for {type(module).__name__}: {reason}")
    weight = embedding.weight
    rows = TokenRows(tokens, weight.shape[1], weight.device, dtype)
    if values is not None:
        rows.set_to(values)
    elif not weight.is_meta:
        rows.set_to(weight.detach()[rows.indices])
    rows.train(embedding.training)
    for module in (embedding, *followers):
        module.requires_grad_(False)
        state = {"adapter_enabled": True, "merged": False, "unmerged_rows": None}
        # a tuple, so that the rows are a child of the embedding alone
        state["followed_rows"] = None if module is embedding else (rows,)
        vars(module).update(state)
        module.__class__ = _class_with_rows(type(module))  # pyright: ignore
        show_forward(module)
    embedding.token_rows = rows
    assert isinstance(embedding, WithTokenRows)
    return embedding


def take_token_rows_off(module: WithTokenRows) -> None:
    """Make a module what it was before, in place; whether it wants gradients aside.

    Args:
        module: One that is not merged.
    """
    for name in _ATTRIBUTES:
        module._modules.pop(name, None)
        vars(module).pop(name, None)
    module.__class__ = module.base_type  # pyright: ignore[reportAttributeAccessIssue]
    show_forward(module)


@functools.cache
def _class_with_rows(base_type: type[nn.Module]) -> type[WithTokenRows]:
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"{base_type.__name__} with rows of its own for some tokens.",
        "__reduce_ex__": _reduce_by_base_type,
        "base_type": base_type,
    }
    return type(f"{base_type.__name__}WithTokenRows", (WithTokenRows, base_type), namespace)


def _reduce_by_base_type(self: WithTokenRows, protocol: int) -> tuple[Any, ...]:
    # The class was made at run time and has no importable name; its base has.
    state = object.__reduce_ex__(self, 2)[2]
    return _new_with_rows, (self.base_type,), state


def _new_with_rows(base_type: type[nn.Module]) -> nn.Module:
    cls = _class_with_rows(base_type)
    return cls.__new__(cls)
