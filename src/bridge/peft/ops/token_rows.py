"""Chosen rows of an embedding, and of a head that is tied to it, in place of the base's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def replaced_rows_reference(weight: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Return W with some of its rows replaced; the oracle of the two below.

    Args:
        weight: (num_embeddings, embedding_dim).
        rows: (count, embedding_dim), the new rows.
        tokens: (count,), which rows of W they stand for.
    """
    return weight.index_copy(0, tokens, rows.to(weight.dtype))


def looked_up(
    base_out: Tensor, ids: Tensor, rows: Tensor, tokens: Tensor, factor: Tensor | float | None
) -> Tensor:
    """Return an embedding's output with the chosen tokens' rows in place of the base's.

    Neither W nor its gradient is ever as large as the vocabulary.

    Args:
        base_out: (..., embedding_dim), the base's rows of `ids`; not written to.
        ids: (...), indices of tokens.
        rows: (count, embedding_dim), the new rows.
        tokens: (count,), which tokens they are, in ascending order.
        factor: What the base multiplies its rows by, if anything.
    """
    place = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
    is_chosen = (tokens[place] == ids).unsqueeze(-1)
    # rounded as a row of W is before it is scaled
    new = F.embedding(place, rows.to(base_out.dtype))
    if factor is not None:
        new = new * (factor.to(new.dtype) if isinstance(factor, Tensor) else factor)
    return torch.where(is_chosen, new, base_out)


def projected(
    base_out: Tensor, x: Tensor, rows: Tensor, tokens: Tensor, bias: Tensor | None
) -> Tensor:
    """Write a head's outputs for the chosen tokens into `base_out`, in place, and return it.

    Args:
        base_out: (..., num_embeddings), a result of `F.linear` that nobody else holds.
        x: (..., embedding_dim).
        rows: (count, embedding_dim), the new rows of the head's weight.
        tokens: (count,), which tokens they are.
        bias: The head's, (num_embeddings,), or None.
    """
    new = F.linear(x, rows.to(x.dtype), None if bias is None else bias[tokens])
    return base_out.index_copy_(-1, tokens, new.to(base_out.dtype))
