"""Which parameters a recipe targets by `target_parameters`; every stack of matrices is told of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bridge.peft.branch.kinds.experts import parameter_refusal
from bridge.peft.errors import TargetError
from bridge.peft.targets import Candidate, Skipped, candidates, did_you_mean


def match_parameters(
    model: nn.Module,
    entries: Sequence[str],
    exclude: Sequence[str],
    left_alone: Mapping[nn.Module, str],
) -> tuple[list[Candidate], list[Skipped], list[str]]:
    """Find the parameters that a recipe adapts.

    Args:
        model: The model; it is not touched.
        entries: As `targets.matches` takes them, for the names of parameters.
        exclude: Entries of modules or parameters to leave alone.
        left_alone: Modules whose parameters are left alone, with the reason.

    Returns:
        The parameters to adapt, in the model's order; every other parameter of three dimensions,
        with the reason and the entry that would adapt it; and the entries of `exclude` that mean
        no parameter to adapt.

    Raises:
        TargetError: An entry matches nothing, or nothing that can be adapted.
    """
    modules = candidates(model)
    everything = [parameter for module in modules for parameter in _parameters(module)]
    reasons = {
        c.fqn: left_alone.get(c.module) or parameter_refusal(c.module, c.parameter)
        for c in everything
    }
    wanted = {fqn for entry in entries for fqn in _targets_of(entry, everything, reasons)}
    holders = {c.module: c for c in modules}
    excluded: set[str] = set()
    others: list[str] = []
    for entry in exclude:
        hits = {
            c.fqn
            for c in everything
            if c.fqn in wanted and (c.matches(entry) or holders[c.module].matches(entry))
        }
        excluded |= hits
        if not hits:
            others.append(entry)
    chosen = [c for c in everything if c.fqn in wanted - excluded]
    if entries and not chosen:
        raise TargetError(
            f"all {len(wanted)} parameters that target_parameters means are excluded; leave it out"
        )
    frozen = [
        Skipped(
            c.fqn,
            type(c.module).__name__,
            "excluded" if c.fqn in excluded else reasons[c.fqn] or _how_to_adapt(c),
        )
        for c in everything
        if c not in chosen and _tensor(c).dim() == 3 and not isinstance(c.module, _ConvNd)
    ]
    return chosen, frozen, others


def _parameters(module: Candidate) -> list[Candidate]:
    """The parameters of a module that have two or three dimensions, each as a candidate."""
    return [
        dataclasses.replace(
            module,
            fqn=f"{module.fqn}.{name}".lstrip("."),
            names=tuple(f"{fqn}.{name}".lstrip(".") for fqn in module.names),
            parameter=name,
        )
        for name, parameter in module.module._parameters.items()
        if parameter is not None and parameter.dim() in (2, 3)
    ]


def _targets_of(
    entry: str, everything: Sequence[Candidate], reasons: Mapping[str, str | None]
) -> set[str]:
    hits = [c for c in everything if c.matches(entry)]
    if not hits:
        pool = [c for c in everything if reasons[c.fqn] is None]
        raise TargetError(
            f"target_parameters entry {entry!r} matches none of the {len(pool)} parameters that "
            f"can be adapted{did_you_mean(entry, pool) if pool else ''}"
        )
    adaptable = {c.fqn for c in hits if reasons[c.fqn] is None}
    if not adaptable:
        raise TargetError(
            f"target_parameters entry {entry!r} matches only parameters that cannot be adapted "
            f"(first: {hits[0].fqn}: {reasons[hits[0].fqn]})"
        )
    return adaptable


def _how_to_adapt(candidate: Candidate) -> str:
    shape = "×".join(str(size) for size in _tensor(candidate).shape)
    if 1 in _tensor(candidate).shape[:2]:  # a token, positions: nothing that is multiplied with
        return f"a parameter of its own ({shape}), frozen"
    parts = candidate.fqn.split(".")[-2:]
    entry = ".".join(part for part in parts if not part.isdecimal())
    return f"a stack of matrices ({shape}), frozen; target_parameters={[entry]!r} adapts it"


def _tensor(candidate: Candidate) -> Tensor:
    parameter = candidate.module._parameters[candidate.parameter]
    assert parameter is not None
    return parameter
