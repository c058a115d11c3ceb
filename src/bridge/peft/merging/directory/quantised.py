"""The weights that an adapter of a quantised base was trained on, out of the 16-bit checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bridge.peft.branch.quantised.format import Format
from bridge.peft.branch.quantised.table import FORMATS
from bridge.peft.dtypes import FLOATING as WIDE
from bridge.peft.errors import AdapterError
from bridge.peft.formats.files.safetensors_file import FLOATING, Entry
from bridge.peft.formats.peft import AdapterFile
from bridge.peft.formats.peft.fingerprint import packed_fingerprint
from bridge.peft.formats.peft.keys import is_embedding, is_head
from bridge.peft.formats.peft.quantised_base import QuantisedGroup, read_groups
from bridge.peft.model.walk import some_names

#: What `quantize` may be; the last one takes the checkpoint's weights in spite of all.
QUANTISE = ("nf4", "fp4", "int8", "none")
_IN_PYTHON = (
    "load the base quantised as it was and the adapter in Python, merge(model) and save_pretrained"
)
#: What bitsandbytes does unless told otherwise, with QLoRA's quantised scales.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "nf4": {"double_quantised": True, "block_size": 64, "storage": "uint8"},
    "fp4": {"double_quantised": True, "block_size": 64, "storage": "uint8"},
    "int8": {},
}


@dataclass(frozen=True)
class Quantised:
    """How one weight of a checkpoint is quantised before it is merged into.

    Attributes:
        fqn: The linear.
        form: The format.
        settings: What it takes to quantise it as it was.
        expected: The fingerprint that the adapter has of it; None if it has none.
    """

    fqn: str
    form: Format
    settings: Mapping[str, Any]
    expected: Mapping[str, Any] | None = None

    def dense(self, weight: Tensor) -> Tensor:
        """The weight that was trained on.

        Args:
            weight: The checkpoint's, (out_features, in_features).

        Raises:
            AdapterError: It is another one, by the adapter's fingerprint.
        """
        # what does not tell the dtype that it was quantised from may have been loaded in bfloat16
        dtypes = [weight.dtype] if "dtype" in self.settings else [weight.dtype, torch.bfloat16]
        for dtype in dtypes:
            packed = self.form.pack(weight.to(dtype), self.settings)
            if self._is_expected(packed):
                return self.form.dense(packed)
        raise AdapterError(
            f"{self.fqn}, quantised to {self.settings['kind']}, has other values than the adapter "
            "was trained on: it is another base model, or another device quantised it otherwise; "
            f"{_IN_PYTHON}"
        )

    def _is_expected(self, packed: Any) -> bool:
        """Whether the packed values are the fingerprint's; the scales may round otherwise."""
        if self.expected is None:
            return True
        got = packed_fingerprint(self.form, packed, "")
        return all(got[name] == self.expected[name] for name in ("dtype", "hash"))


@dataclass(frozen=True)
class TrainedOn:
    """What was quantised of a base.

    Attributes:
        by_name: By the linear's name when it was trained, those without a branch included.
        guess: How a linear is quantised that no adapter tells of; None if they do tell.
        notes: What the user should know.
    """

    by_name: Mapping[str, Quantised] = field(default_factory=dict)
    guess: tuple[Format, Mapping[str, Any]] | None = None
    notes: tuple[str, ...] = ()


def trained_on(adapters: Sequence[AdapterFile], quantize: str | None) -> TrainedOn:
    """Which linears an adapter's base had quantised, and how.

    Args:
        adapters: They must agree.
        quantize: What the caller says: one of `QUANTISE`, or None.

    Raises:
        AdapterError: The caller says nothing, or something else than the adapters.
    """
    if quantize not in (None, *QUANTISE):
        raise AdapterError(f"--quantize is {quantize!r}; pass one of {', '.join(QUANTISE)}")
    groups = [read_groups(adapter.extra) for adapter in adapters]
    labels = [_label(adapter, found) for adapter, found in zip(adapters, groups, strict=True)]
    if quantize == "none":
        return TrainedOn(notes=tuple(_in_spite(label) for label in labels if label))
    if quantize is None:
        if label := next(filter(None, labels), None):
            raise _must_say(label, groups)
        return TrainedOn()
    if any(told != groups[0] for told in groups[1:]):
        raise AdapterError(
            f"the adapters were trained on bases that were quantised differently; {_IN_PYTHON}"
        )
    if not groups[0]:
        return _guessed(quantize)
    stored = {name: entry for a in adapters for name, entry in a.extra.get("base", {}).items()}
    return TrainedOn(dict(_told(groups[0], quantize, stored)))


def others_to_quantise(
    base: TrainedOn, keys: Mapping[str, str], entries: Mapping[str, Entry]
) -> Iterator[tuple[str, Quantised | None]]:
    """The checkpoint's key of each quantised linear that carries no branch, and how.

    Args:
        base: What was quantised.
        keys: The keys of the adapted weights, by name.
        entries: The checkpoint's tensors.

    Raises:
        AdapterError: A linear is not in the checkpoint.
    """
    if base.guess is not None:
        for key, entry in entries.items():
            is_matrix = len(entry.shape) == 2 and entry.dtype in FLOATING
            is_linear = is_matrix and key.endswith(".weight")
            if is_linear and key not in keys.values() and not (is_head(key) or is_embedding(key)):
                yield key, how_for(base, key.removesuffix(".weight"), entry)
    missing: list[str] = []
    for fqn in base.by_name:
        name = f"{fqn}.weight"
        if name in keys:
            continue
        if (key := _key(name, keys, entries)) is None:
            missing.append(fqn)
        else:
            yield key, how_for(base, fqn, entries[key])
    if missing:
        raise AdapterError(
            f"the checkpoint holds no weight for {some_names(missing)}, which was quantised when "
            f"the adapter was trained; {_IN_PYTHON}"
        )


def how_for(base: TrainedOn, fqn: str, entry: Entry) -> Quantised | None:
    """How a linear was quantised; None if it was not.

    Args:
        base: What was quantised.
        fqn: The linear's name.
        entry: Its weight in the checkpoint.
    """
    if base.guess is None:
        return base.by_name.get(fqn)
    form, settings = base.guess
    dtype = str(FLOATING[entry.dtype]).removeprefix("torch.")
    return Quantised(fqn, form, {"dtype": dtype, **settings})


def _key(name: str, keys: Mapping[str, str], entries: Mapping[str, Entry]) -> str | None:
    """The checkpoint's key: the name, or with the beginning exchanged as in the adapted ones."""
    if name in entries:
        return name
    for ours, theirs in keys.items():
        end = 0
        while end < min(len(ours), len(theirs)) and ours[-end - 1] == theirs[-end - 1]:
            end += 1
        old, new = ours[: len(ours) - end], theirs[: len(theirs) - end]
        if name.startswith(old) and new + name[len(old) :] in entries:
            return new + name[len(old) :]
    return None


def _told(
    groups: Sequence[QuantisedGroup], quantize: str, stored: Mapping[str, Any]
) -> Iterator[tuple[str, Quantised]]:
    for group in groups:
        settings = group.settings or {}
        ours = (f for f in FORMATS if f.library == group.library and f.makes(settings))
        if (form := next(ours, None)) is None:
            raise AdapterError(
                f"the base was {group.label}, which cannot be made here; {_IN_PYTHON}"
            )
        if settings["kind"] != quantize:
            raise AdapterError(
                f"the adapter was trained on a base that was {group.label}; pass --quantize "
                f"{settings['kind']}, got {quantize}"
            )
        for fqn in group.modules:
            yield fqn, Quantised(fqn, form, settings, stored.get(fqn))


def _guessed(quantize: str) -> TrainedOn:
    settings = {"kind": quantize, **_DEFAULTS[quantize]}
    form = next(f for f in FORMATS if f.library == "bitsandbytes" and f.makes(settings))
    told = ", scales quantised too, in blocks of 64" if _DEFAULTS[quantize] else ""
    note = (
        f"the adapter does not say how its base was quantised: taken is bitsandbytes' {quantize}"
        f"{told}, of all linears but the output head, from the checkpoint's dtype"
    )
    return TrainedOn(guess=(form, settings), notes=(note,))


def _label(adapter: AdapterFile, groups: Sequence[QuantisedGroup]) -> str:
    """What the base of an adapter was, if it was quantised; else empty."""
    if groups:
        return groups[0].label
    kinds = {entry["dtype"] for entry in adapter.extra.get("base", {}).values()} - {*WIDE}
    return f"stored in {min(kinds)}" if kinds else ""


def _in_spite(label: str) -> str:
    return (
        f"the adapter was trained on a base that was {label}, and is merged into the weights that "
        "that was made from; results differ from training"
    )


def _must_say(label: str, groups: Sequence[Sequence[QuantisedGroup]]) -> AdapterError:
    settings = [group.settings or {} for told in groups for group in told]
    kinds = {str(s.get("kind")) for s in settings} & {*QUANTISE}
    known = (
        f"pass --quantize {min(kinds)} to merge into what those dequantise to"
        if kinds
        else (f"to merge into those, {_IN_PYTHON}")
    )
    return AdapterError(
        f"the adapter was trained on a base that was {label}, not on the checkpoint's weights; "
        f"{known}; --quantize none merges into the checkpoint's all the same"
    )
