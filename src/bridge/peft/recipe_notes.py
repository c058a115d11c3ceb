"""What a user should know of a recipe on a model before training with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from bridge.peft.branch.kinds.experts import is_attention
from bridge.peft.branch.options import BranchOptions
from bridge.peft.model.adapt import PlannedTokens
from bridge.peft.model.encoder_fast_path import zeroes_padding
from bridge.peft.model.pretrained import random_modules
from bridge.peft.model.walk import some_names
from bridge.peft.model.weight_reads import read_weights
from bridge.peft.targets import Candidate, tied_linears, tied_modules


def notes(
    model: nn.Module,
    chosen: Sequence[Candidate],
    trained: Sequence[Candidate],
    tokens: Sequence[PlannedTokens],
    options: BranchOptions,
) -> Iterator[str]:
    """What the user should know before training with a recipe.

    Args:
        model: The base model, not wrapped.
        chosen: What is adapted.
        trained: What is trained in full.
        tokens: The embeddings of which some rows are trained.
        options: Those of the branches, patterns aside.
    """
    covered = {id(m) for candidate in trained for m in candidate.module.modules()}
    covered |= {id(m) for plan in tokens for m in (plan.module, *plan.followers)}
    random = [f for f, m in random_modules(model).items() if id(m) not in covered]
    if random:
        yield (
            f"{some_names(random)}: from no checkpoint (random, or resized since loading), and "
            f"frozen; to train them in full pass modules_to_train={random[:5]}"
        )
    half = [c.fqn for c in trained if any(p.itemsize == 2 for p in c.module.parameters())]
    if half:
        yield (
            f"{some_names(half)}: trained in full in 16 bits, in which small steps are lost; "
            "load the model in float32 and train under autocast"
        )
    tied, tied_linear = tied_modules(model), tied_linears(model)
    for c in chosen:  # a head that is tied to an embedding computes apart from it anyway
        if c.module in tied and (isinstance(c.module, nn.Embedding) or c.module in tied_linear):
            yield (
                f"{c.fqn}: shares its weight with {some_names(tied[c.module])}, which the "
                "branch does not reach; merging will ask to untie them"
            )
    read = read_weights(model)
    embeddings = {c.fqn: c.module for c in chosen if isinstance(c.module, nn.Embedding)}
    passed = [c.fqn for c in chosen if c.module in read and not isinstance(c.module, nn.Linear)]
    undropped = [c.fqn for c in chosen if _is_read(c, read) and c.fqn not in passed]
    if options.dropout and undropped:
        yield f"{some_names(undropped)}: read by the model's own code, where dropout cannot act"
    if options.dropout and options.dropout_position == "pre" and embeddings:
        yield (
            f"{some_names([*embeddings])}: an embedding's input is a token, of which dropout "
            "drops nothing; dropout_position='post' acts there"
        )
    if encoders := zeroes_padding(model, {c.module for c in chosen}):
        yield (
            f"{some_names(encoders)}: in evaluation torch gives zeros at padded positions there; "
            "adapted it computes them as in training, so leave them out where you pool over tokens"
        )
    if passed:
        yield (
            f"{some_names(passed)}: the model's own code reads its weight too, where the "
            "branch takes no part, and merging would change that; leave it out"
        )


def _is_read(candidate: Candidate, read: Mapping[nn.Module, Sequence[nn.Module]]) -> bool:
    """Whether the branch takes part where other code reads the weight, as the dense sum."""
    return candidate.module in read or (
        bool(candidate.parameter) and is_attention(candidate.module)
    )
