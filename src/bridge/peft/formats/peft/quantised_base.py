"""How the base of an adapter was quantised, so that a merge can find the same weights again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from bridge.peft.branch.quantised.table import FORMATS
from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.peft.fingerprint import base_part
from bridge.peft.model.walk import base_modules

#: The field of `bridge_adapter.json`.
FIELD = "quantised"


@dataclass(frozen=True, kw_only=True)
class QuantisedGroup:
    """Linears that were quantised alike.

    Attributes:
        label: `"nf4, double quantised (bitsandbytes)"`.
        library: The package that did it.
        settings: What it takes to do it again; None if that is not known.
        modules: Their fully qualified names, those without a branch included.
    """

    label: str
    library: str
    settings: dict[str, Any] | None
    modules: tuple[str, ...]


def quantised_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The quantised linears of a model, ready for JSON; empty if there are none.

    Args:
        model: A model, not wrapped.
    """
    groups: dict[str, dict[str, Any]] = {}
    for fqn, module in base_modules(model).items():
        base = base_part(module)
        found = ((form, told) for form in FORMATS if (told := form.told(base)) is not None)
        form, (label, settings) = next(found, (None, ("", None)))
        if form is not None:
            group = QuantisedGroup(label=label, library=form.library, settings=settings, modules=())
            known = groups.setdefault(repr(group), asdict(group) | {"modules": []})
            known["modules"].append(fqn)
    return list(groups.values())


def read_groups(extra: Mapping[str, Any]) -> list[QuantisedGroup]:
    """How a base was quantised, out of `bridge_adapter.json`; empty if it was not, or is not told.

    Args:
        extra: The decoded file.

    Raises:
        AdapterFileError: The field has another form.
    """
    content = extra.get(FIELD, [])
    try:
        return [_group(item) for item in content]
    except (TypeError, KeyError, ValueError) as error:
        raise AdapterFileError(
            f"bridge_adapter.json: {FIELD} must list label, library, settings and modules, got "
            f"{content!r:.80}"
        ) from error


def _group(item: Any) -> QuantisedGroup:
    group = QuantisedGroup(**item | {"modules": tuple(item["modules"])})
    words = (group.label, group.library, *group.modules)
    if not all(isinstance(word, str) for word in words):
        raise TypeError
    if group.settings is not None and not isinstance(group.settings, dict):
        raise TypeError
    return group
