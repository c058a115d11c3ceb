"""Which modules a recipe targets: names, wildcards, regexes, `"all-linear"`; did-you-mean."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bridge.peft._optional import TELinear
from bridge.peft.branch.kinds.attention import OUT_PROJECTION, attention_refusal
from bridge.peft.branch.kinds.experts import IN_PROJECTION
from bridge.peft.branch.kinds.packed import PackedLinearAdapter
from bridge.peft.branch.patch import adapted_class
from bridge.peft.branch.quantised.table import format_of
from bridge.peft.branch.registry import kind_of, unsupported_reason
from bridge.peft.errors import TargetError
from bridge.peft.model.walk import clean_fqn, output_head
from bridge.peft.parallel.megatron import is_embedding

ALL_LINEAR = "all-linear"
#: Names by which a direct child of the model, if it is a linear, is its output head.
_HEAD_NAMES = frozenset(
    ("lm_head", "output_layer", "embed_out", "output", "head", "score", "classifier", "qa_outputs")
)


@dataclass(frozen=True)
class Candidate:
    """A module, or a parameter of one, under all the names that reach it.

    Attributes:
        fqn: Its first fully qualified name.
        module: The module.
        names: All its fully qualified names, the first included.
        parameter: The name in the module of the parameter that is meant; empty for the module.
    """

    fqn: str
    module: nn.Module
    names: tuple[str, ...]
    parameter: str = ""

    @property
    def weight(self) -> Tensor:
        """The tensor that the branch stands on."""
        if self.parameter:
            return getattr(self.module, self.parameter)
        return adapted_class(type(self.module)).weight_of(self.module)

    def matches(self, entry: str) -> bool:
        """Whether any of the names matches `entry`."""
        return any(matches(entry, name) for name in self.names)


@dataclass(frozen=True)
class Skipped:
    """A module that is, or looks like, a linear and is not adapted.

    Attributes:
        fqn: Its first fully qualified name.
        base_type: Its class name.
        reason: Why it is not adapted.
    """

    fqn: str
    base_type: str
    reason: str


def matches(entry: str, fqn: str) -> bool:
    """Whether one target entry matches one fully qualified name.

    Args:
        entry: A name (`"q_proj"`, `"self_attn.q_proj"`: the last components or all of them), a
            wildcard over the whole name (`"*.layers.0.*.q_proj"`; `*` also crosses dots), or
            `"re:"` and a regex that must match the whole name.
        fqn: A fully qualified name.
    """
    if entry.startswith("re:"):
        return re.fullmatch(entry[3:], fqn) is not None
    if any(character in entry for character in "*?["):
        return fnmatch.fnmatchcase(fqn, entry)
    return fqn == entry or fqn.endswith(f".{entry}")


def candidates(model: nn.Module) -> list[Candidate]:
    """All modules, each once, with every name that reaches it, wrapper levels left out."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(clean_fqn(fqn))
        modules[id(module)] = module
    return [Candidate(n[0], modules[key], tuple(n)) for key, n in names.items()]


def output_heads(model: nn.Module) -> set[int]:
    """The ids of the linears that are the model's output head, tied to an embedding or not.

    A head is what transformers' `get_output_embeddings()` answers, a linear that shares its weight
    with an embedding, or a direct child linear with one of the usual names (`lm_head`, `score`, …).
    """
    heads = {
        id(child)
        for name, child in model.named_children()
        if name in _HEAD_NAMES and _is_linear(child)
    }
    if (head := output_head(model)) is not None:
        heads.add(id(head))
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads.update(
        id(m)
        for m in model.modules()
        if isinstance(m, nn.Linear) and id(getattr(m, "weight", m)) in embedded
    )
    return heads


def is_linear(module: nn.Module) -> bool:
    """Whether `"all-linear"` means a module that can be adapted.

    Args:
        module: Any module.
    """
    kind = kind_of(type(module))
    return kind is not None and kind.in_all_linear


def tied_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The linears and embeddings whose weight another one holds too, with the others' names.

    Args:
        model: The model; it is not touched.
    """
    holders: dict[int, dict[nn.Module, str]] = {}
    for candidate in candidates(model):
        if isinstance(candidate.module, nn.Linear | nn.Embedding):
            if (weight := getattr(candidate.module, "weight", None)) is None:
                continue  # packed under other names
            key = id(weight)
            holders.setdefault(key, {})[candidate.module] = candidate.fqn
    return {
        module: [fqn for other, fqn in named.items() if other is not module]
        for named in holders.values()
        for module in named
        if len(named) > 1
    }


def _is_linear(module: nn.Module) -> bool:
    kind = kind_of(type(module))
    return isinstance(module, nn.Linear) or (kind is not None and kind.wraps)


def tied_linears(model: nn.Module) -> set[nn.Module]:
    """The linears whose weight is another linear's too.

    Args:
        model: The model; it is not touched.
    """
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            holders.setdefault(id(getattr(module, "weight", module)), []).append(module)
    return {module for modules in holders.values() if len(modules) > 1 for module in modules}


def match_modules(model: nn.Module, entries: Sequence[str], field: str) -> list[Candidate]:
    """The modules that entries mean, whatever they are, without those inside another of them.

    Args:
        model: The model; it is not touched.
        entries: As `matches` takes them.
        field: Where they stand, for messages.

    Raises:
        TargetError: An entry matches nothing.
    """
    everything = candidates(model)
    hits = {id(c.module): c for entry in entries for c in _matching(entry, everything, field)}
    inside = {id(m) for c in hits.values() for m in c.module.modules() if m is not c.module}
    return [c for c in everything if id(c.module) in hits.keys() - inside]


def match_targets(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: Sequence[str] = (),
    left_alone: Mapping[nn.Module, str] | None = None,
) -> tuple[list[Candidate], list[Skipped]]:
    """Find what a recipe adapts.

    Args:
        model: The model; it is not touched.
        targets: Entries as `matches` takes them, or `"all-linear"`: every linear but the output
            head.
        exclude: Entries of modules to leave alone.
        left_alone: Modules to leave alone whatever matches them, with the reason.

    Returns:
        The modules to adapt, in the model's order, and those that are (or look like) linears and
        are left alone, with the reason.

    Raises:
        TargetError: An entry matches nothing, or nothing that can be adapted.
    """
    everything = candidates(model)
    alone = left_alone or {}
    reasons = {id(c.module): alone.get(c.module) or _unsupported(c) for c in everything}
    adaptable = [c for c in everything if reasons[id(c.module)] is None]
    linears = [c for c in adaptable if is_linear(c.module)]
    if not (linears if targets == ALL_LINEAR else adaptable):
        raise TargetError(
            f"{type(model).__name__} has no linear that can be adapted"
            f"{_first_reason(everything, reasons)}"
        )
    excluded = {key for entry in exclude for key in _excluded_by(entry, everything, reasons)}
    heads: set[int] = set()
    if targets == ALL_LINEAR:
        heads = output_heads(model)
        wanted = {id(c.module) for c in linears} - heads
    else:
        wanted = set()
        for entry in [targets] if isinstance(targets, str) else targets:
            wanted |= _targets_of(entry, everything, adaptable, reasons)
    chosen = [p for c in adaptable if id(c.module) in wanted - excluded for p in _parts_of(c)]
    if not chosen:
        raise TargetError(
            f"all {len(linears)} linears are excluded or output heads; name the ones to adapt in "
            "target_modules"
        )
    skipped = []
    adapted = {id(c.module) for c in chosen}
    for candidate in everything:
        key = id(candidate.module)
        if key in adapted:
            continue
        if reasons[key] is None:
            reason = "output head" if key in heads else "excluded" if key in excluded else None
            if reason is None and isinstance(candidate.module, nn.MultiheadAttention):
                name = candidate.fqn.rpartition(".")[2]
                reason = f"torch's attention; target_modules={[name]!r} adapts its projections"
        else:
            reason = _why_not(candidate.module, reasons[key])
        if reason:
            skipped.append(Skipped(candidate.fqn, type(candidate.module).__name__, reason))
    return chosen, skipped


def _unsupported(candidate: Candidate) -> str | None:
    """Why a module cannot be adapted, or what is in it; None if it can."""
    module = candidate.module
    if isinstance(module, nn.MultiheadAttention):
        return attention_refusal(module)
    return unsupported_reason(module)


def _parts_of(candidate: Candidate) -> list[Candidate]:
    """What is adapted where a module is meant: of torch's attention both projections.

    Patterns mean both by the attention's name too.
    """
    attention = candidate.module
    if not isinstance(attention, nn.MultiheadAttention):
        return [candidate]
    modules = {IN_PROJECTION: attention, OUT_PROJECTION: attention.out_proj}
    return [
        dataclasses.replace(
            candidate,
            fqn=f"{candidate.fqn}.{part}".lstrip("."),
            module=module,
            names=(*(f"{name}.{part}".lstrip(".") for name in candidate.names), *candidate.names),
            parameter=part if module is attention else "",
        )
        for part, module in modules.items()
    ]


def _first_reason(everything: list[Candidate], reasons: dict[int, str | None]) -> str:
    """Why the first linear cannot be; empty where there is none."""
    for candidate in everything:
        if isinstance(candidate.module, nn.Linear) or format_of(candidate.module) is not None:
            name = candidate.fqn or "the model itself"
            return f"; the first is {name}: {reasons[id(candidate.module)]}"
    return ""


def _targets_of(
    entry: str,
    everything: list[Candidate],
    pool: list[Candidate],
    reasons: dict[int, str | None],
) -> set[int]:
    hits = _matching(entry, everything, "target_modules", pool)
    adaptable = {id(c.module) for c in hits if reasons[id(c.module)] is None}
    if not adaptable:
        found = sorted({type(c.module).__name__ for c in hits})
        raise TargetError(
            f"target_modules entry {entry!r} matches only modules that cannot be adapted: "
            f"{', '.join(found)} (first: {hits[0].fqn}: {reasons[id(hits[0].module)]})"
            f"{_below(hits, reasons)}"
        )
    return adaptable


def _excluded_by(
    entry: str, everything: list[Candidate], reasons: dict[int, str | None]
) -> set[int]:
    hits = _matching(entry, everything, "exclude_modules")
    keys = {id(c.module) for c in hits}
    if all(reasons[key] for key in keys) and (below := _below(hits, reasons)):
        raise TargetError(
            f"exclude_modules entry {entry!r} matches {hits[0].fqn}, which is not a linear "
            f"itself, so it would exclude nothing{below}"
        )
    return keys


def _below(hits: list[Candidate], reasons: dict[int, str | None]) -> str:
    """How to name the linears below what an entry matches; empty where there are none."""
    for hit in hits:
        if any(reasons.get(id(m), "") is None for m in hit.module.modules()):
            return f"; the linears below it are {hit.fqn + '.*'!r}"
    return ""


def _matching(
    entry: str, everything: list[Candidate], field: str, pool: list[Candidate] | None = None
) -> list[Candidate]:
    """The candidates that match `entry`; `TargetError` with the nearest names where none does."""
    hits = [c for c in everything if c.fqn and c.matches(entry)]
    if hits:
        return hits
    known = everything if pool is None else pool
    linears = sum(is_linear(c.module) for c in known)
    what = f"{len(known)} modules" if pool is None else f"{linears} linears"
    raise TargetError(
        f"{field} entry {entry!r} matches none of the {what}{did_you_mean(entry, known)}"
    )


def did_you_mean(entry: str, pool: list[Candidate]) -> str:
    """The end of an error message: the names nearest to an entry that matches none of `pool`."""
    if re.fullmatch("all.?linears?", entry, re.IGNORECASE):
        return f"; for every linear pass target_modules={ALL_LINEAR!r}, not in a list"
    plain = entry.removeprefix("re:").strip("*.^$")
    last = {c.fqn.rpartition(".")[2] for c in pool}
    near = _nearest(plain.rpartition(".")[2], last) or _nearest(plain, {c.fqn for c in pool})
    if near:
        return f"; did you mean {', '.join(repr(name) for name in near)}?"
    some = sorted(last)[:8]
    return f"; their names end in {', '.join(repr(name) for name in some)}"


def _nearest(name: str, names: set[str]) -> list[str]:
    by_lower = {known.lower(): known for known in sorted(names)}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return [by_lower[lower] for lower in near]


def _why_not(module: nn.Module, reason: str | None) -> str | None:
    """Why a module that looks like a linear is not adapted; None if it does not look like one."""
    if isinstance(module, nn.Linear | TELinear) or format_of(module) is not None:
        return reason
    if kind_of(type(module)) not in (None, PackedLinearAdapter):
        return reason
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | _ConvNd) or is_embedding(type(module)):
        return None
    matrices = {n: p for n, p in module._parameters.items() if p is not None and p.dim() in (2, 3)}
    if any(parameter.dim() == 3 for parameter in matrices.values()):
        return None  # each is told of by itself
    for name, parameter in matrices.items():
        if min(parameter.shape) > 1:
            shape = "×".join(str(size) for size in parameter.shape)
            return f"its parameter {name!r} ({shape}) is not the weight of a linear module"
    return None
