"""What the conversions share: what they give, and how A and B find their places."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.convert.layout import AttentionLayout
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.config import alpha_for, new_config
from bridge.peft.formats.peft.consistency import check_adapter
from bridge.peft.formats.peft.names import choose_targets
from bridge.peft.model.walk import some_names

_PEFT_NAME = re.compile(r"(?P<prefix>.*\.)?layers\.(?P<layer>\d+)\.(?P<end>\w+\.\w+)")


@dataclass(frozen=True, kw_only=True)
class Step:
    """How one module was converted.

    Attributes:
        name: Its name in the new format.
        how: In a few words.
        error: Relative error of its update, 0 where the conversion is exact.
    """

    name: str
    how: str
    error: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Converted:
    """An adapter in a foreign format.

    Attributes:
        tensors: By the format's own keys.
        extra: What goes into `bridge_adapter.json`: what the tensors do not say.
        steps: What was done, module by module.
        config: What goes into `adapter_config.json`, if the format has one.
    """

    tensors: dict[str, Tensor]
    extra: dict[str, Any]
    steps: list[Step]
    config: dict[str, Any] | None = None


def extra_of(
    adapter: AdapterFile, layout: AttentionLayout, dim: int, scale: float, **more: Any
) -> dict[str, Any]:
    """What a foreign directory's `bridge_adapter.json` holds, so that the way back is exact.

    Args:
        adapter: The PEFT adapter.
        layout: The model's attention layout.
        dim: The one rank of the foreign format.
        scale: Its one scale.
        **more: Fields of this format.
    """
    return {
        "dim": dim,
        "alpha": alpha_for(scale, dim),
        "dropout": adapter.parsed.lora_dropout,
        "layout": asdict(layout),
        "peft": {"config": adapter.config, "extra": adapter.extra},
        **more,
    }


def places(
    adapter: AdapterFile, ends: Collection[str], tool: str
) -> tuple[str, dict[str, tuple[int, str]]]:
    """Where each module of an adapter is in a Llama or Qwen type model.

    Args:
        adapter: A PEFT adapter.
        ends: Names of linears within a layer that the other tool knows, and of those outside.
        tool: Its name, for messages.

    Returns:
        What stands before `layers` in the names, and for each module within a layer that layer and
        its name in it.

    Raises:
        AdapterError: A module is none of these, or there is more than A and B.
    """
    check_nothing_whole(adapter, tool)
    found: dict[str, tuple[int, str]] = {}
    prefixes: set[str] = set()
    for fqn in adapter.tensors:
        if fqn in ends:
            continue
        match = _PEFT_NAME.fullmatch(fqn)
        if match is None or match["end"] not in ends:
            raise AdapterError(
                f"{fqn} has no counterpart in a {tool} model; only the linears of Llama and Qwen "
                "type models have one"
            )
        prefixes.add(match["prefix"] or "")
        found[fqn] = (int(match["layer"]), match["end"])
    if len(prefixes) > 1:
        raise AdapterError(f"the adapter covers {len(prefixes)} stacks of layers; convert one")
    return next(iter(prefixes), "model."), found


def check_nothing_whole(adapter: AdapterFile, tool: str) -> None:
    """Raise `AdapterError` if an adapter is more than A and B.

    Args:
        adapter: A PEFT adapter.
        tool: Whose format cannot say it, for the message.
    """
    if adapter.tokens:
        raise AdapterError(
            f"token rows of {next(iter(adapter.tokens))} are trained, which an adapter of {tool} "
            "cannot hold; save it with the base model"
        )
    if adapter.magnitudes:
        raise AdapterError(
            f"the adapter is DoRA's, whose magnitudes an adapter of {tool} cannot hold; merge it "
            "into the model (bridge-peft merge)"
        )
    if adapter.whole:
        raise AdapterError(
            f"{some_names(sorted(adapter.whole))} is saved in full, which an adapter of {tool} "
            "cannot hold; save it with the base model"
        )
    if adapter.parameters:
        raise AdapterError(
            f"{min(adapter.parameters)} is adapted as experts in one parameter, which an adapter "
            f"of {tool} cannot hold; save it with save_adapter(…, experts='separate')"
        )


def one_rank_and_scale(adapter: AdapterFile, tool: str) -> tuple[int, float]:
    """The rank and the scale of all modules of an adapter.

    Args:
        adapter: A PEFT adapter.
        tool: Whose format has one of each, for the message.

    Raises:
        AdapterError: They differ.
    """
    found = {(adapter.rank(fqn), adapter.scale(fqn)) for fqn in adapter.tensors}
    if len(found) > 1:
        raise AdapterError(
            f"the modules differ in rank or scale, and an adapter of {tool} has one of each; "
            "resize the adapter to one rank first"
        )
    return found.pop()


def prefix_of(extra: Mapping[str, Any]) -> str:
    """What stands before `layers` in PEFT's names: empty, or names each with a dot.

    Args:
        extra: The decoded `bridge_adapter.json` of a foreign directory.

    Raises:
        AdapterFileError: It says something else.
    """
    prefix = extra.get("prefix", "model.")
    if not isinstance(prefix, str) or not re.fullmatch(r"(?:[\w-]{1,200}\.){0,9}", prefix):
        raise AdapterFileError(f"bridge_adapter.json: prefix must be a name, got {prefix!r:.80}")
    return prefix


def restored(
    tensors: dict[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, float],
    extra: Mapping[str, Any],
    layout: AttentionLayout | None,
    magnitudes: Mapping[str, Tensor] | None = None,
    embeddings: Collection[str] = (),
) -> AdapterFile:
    """A PEFT adapter out of a foreign file, with its old config where that still holds.

    Args:
        tensors: A and B by PEFT's names of the modules.
        scales: The factor of each branch.
        extra: The decoded `bridge_adapter.json` of the foreign directory; may be empty.
        layout: The model's, if known: with the number of layers the config can be short.
        magnitudes: DoRA's, by module.
        embeddings: The modules that are embeddings.

    Raises:
        AdapterFileError: Something does not fit.
    """
    magnitudes = dict(magnitudes or {})
    if not magnitudes and (old := _old_adapter(tensors, scales, extra)):
        return dataclasses.replace(old, embeddings={*embeddings})
    alphas = {fqn: alpha_for(scales[fqn], tensors[fqn][0].shape[0]) for fqn in tensors}
    config = new_config(
        {fqn: a.shape[0] for fqn, (a, _) in tensors.items()},
        alphas,
        choose_targets(tensors, _other_linears(tensors, layout)),
        lora_dropout=extra.get("dropout", 0.0),
        use_dora=bool(magnitudes),
    )
    adapter = AdapterFile(
        config=config, tensors=tensors, magnitudes=magnitudes, embeddings={*embeddings}
    )
    check_adapter(adapter)
    return adapter


def _old_adapter(
    tensors: dict[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, float],
    extra: Mapping[str, Any],
) -> AdapterFile | None:
    match extra.get("peft"):
        case {"config": dict(config), "extra": dict(old_extra)}:
            pass
        case _:
            return None
    adapter = AdapterFile(config=config, tensors=tensors, extra=old_extra)
    try:
        check_adapter(adapter)
    except AdapterFileError:
        return None
    return adapter if all(adapter.scale(fqn) == scales[fqn] for fqn in tensors) else None


def _other_linears(tensors: Mapping[str, Any], layout: AttentionLayout | None) -> Iterator[str]:
    """Names that `target_modules` must not mean: the same linears in other layers."""
    kinds: set[tuple[str, str]] = set()
    for fqn in tensors:
        parts = fqn.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if place is not None:
            kinds.add((".".join(parts[:place]), ".".join(parts[place + 1 :])))
    # an unknown layer makes every short name mean too much, so full names are taken
    layers = range(layout.layers) if layout and layout.layers else ("unknown",)
    for prefix, end in kinds:
        for layer in layers:
            if (fqn := f"{prefix}.{layer}.{end}") not in tensors:
                yield fqn
