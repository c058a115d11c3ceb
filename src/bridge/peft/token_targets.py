"""Which tokens of which embeddings a recipe trains, and what is tied to those embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from bridge.peft.branch.token_rows import token_rows_refusal
from bridge.peft.errors import AdapterError, TargetError
from bridge.peft.model.adapt import PlannedTokens
from bridge.peft.model.walk import input_embedding
from bridge.peft.targets import Candidate, candidates, match_modules


def checked_tokens(value: Any) -> dict[str, tuple[int, ...]]:
    """`trainable_tokens` as a recipe takes it: by entry; that of the input embedding is empty.

    Args:
        value: Indices of tokens, or a mapping from entries to them.

    Raises:
        AdapterError: It is neither.
    """
    by_entry = value if isinstance(value, Mapping) else {"": value}
    found: dict[str, tuple[int, ...]] = {}
    for entry, tokens in by_entry.items():
        is_list = isinstance(tokens, Iterable) and not isinstance(tokens, str | Mapping)
        listed: tuple[Any, ...] = tuple(tokens) if is_list else ()
        is_right = isinstance(entry, str) and is_list
        if not is_right or any(type(token) is not int or token < 0 for token in listed):
            raise AdapterError(
                "trainable_tokens takes indices of tokens, or {'embed_tokens': indices}, got "
                f"{value!r:.80}"
            )
        if listed:
            found[entry] = tuple(sorted(set(listed)))
    return found


def match_tokens(model: nn.Module, by_entry: Mapping[str, Sequence[int]]) -> list[PlannedTokens]:
    """Find the embeddings whose rows a recipe trains, and what follows them.

    Args:
        model: The model; it is not touched.
        by_entry: As `checked_tokens` gives it.

    Raises:
        TargetError: An entry matches no embedding, or one that has no such tokens.
    """
    everything = candidates(model)
    planned: list[PlannedTokens] = []
    for entry, tokens in by_entry.items():
        for candidate in _embeddings_of(model, entry, everything):
            check_rows(candidate.fqn, candidate.module, tokens)
            followers = tied_to(candidate.module, everything)
            if not any(p.module is candidate.module or p.module in followers for p in planned):
                plan = PlannedTokens(candidate.fqn, candidate.module, tuple(tokens), followers)
                planned.append(plan)
    return planned


def tied_to(embedding: nn.Module, everything: Sequence[Candidate]) -> tuple[nn.Module, ...]:
    """The linears and embeddings that hold the weight of an embedding too.

    Args:
        embedding: An embedding.
        everything: The model's modules.
    """
    weight = embedding._parameters.get("weight")
    return tuple(
        c.module
        for c in everything
        if c.module is not embedding
        and isinstance(c.module, nn.Linear | nn.Embedding)
        and c.module._parameters.get("weight") is weight
    )


def check_rows(fqn: str, module: nn.Module, tokens: Sequence[int]) -> None:
    """Raise `TargetError` unless a module is an embedding that can have rows for these tokens.

    Args:
        fqn: Its name, for messages.
        module: The module.
        tokens: In ascending order.
    """
    if reason := token_rows_refusal(module, leads=True):
        raise TargetError(f"trainable_tokens means {fqn}, a {type(module).__name__}: {reason}")
    assert isinstance(module, nn.Embedding)
    if tokens[-1] >= module.num_embeddings:
        raise TargetError(
            f"trainable_tokens names token {tokens[-1]}, and {fqn} has {module.num_embeddings} "
            "(model.resize_token_embeddings adds some)"
        )


def _embeddings_of(
    model: nn.Module, entry: str, everything: Sequence[Candidate]
) -> list[Candidate]:
    if entry:
        return match_modules(model, [entry], "trainable_tokens")
    embedding = input_embedding(model)
    found = [c for c in everything if c.module is embedding]
    if not found:
        raise TargetError(
            f"{type(model).__name__} does not say which is its input embedding; pass "
            "trainable_tokens={'embed_tokens': indices} with its name"
        )
    return found
