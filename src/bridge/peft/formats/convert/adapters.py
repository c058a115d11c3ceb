"""Convert adapters between formats; the input's format is told by its keys."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.convert.converted import Step
from bridge.peft.formats.convert.layout import AttentionLayout
from bridge.peft.formats.convert.megatron import from_megatron, from_megatron_model, to_megatron
from bridge.peft.formats.convert.megatron_keys import has_megatron_names
from bridge.peft.formats.convert.mlx import TENSORS_NAME as MLX_TENSORS_NAME
from bridge.peft.formats.convert.mlx import from_mlx, to_mlx
from bridge.peft.formats.convert.plain import from_plain
from bridge.peft.formats.convert.torchtune import from_torchtune, to_torchtune
from bridge.peft.formats.files.adapter_tensors import read_adapter_tensors
from bridge.peft.formats.files.atomic import current_path, write_files
from bridge.peft.formats.files.safetensors_file import read_tensors, serialize
from bridge.peft.formats.files.untrusted import (
    CONFIG_NAME,
    EXTRA_NAME,
    TENSORS_NAME,
    checked_path,
    json_bytes,
    read_json,
    reading,
)
from bridge.peft.formats.peft.adapter_file import (
    AdapterFile,
    adapter_from,
    check_new,
    warn_if_interrupted,
    write_adapter,
)
from bridge.peft.formats.peft.extra import read_extra
from bridge.peft.formats.peft.fields import is_mlx, is_number
from bridge.peft.formats.peft.keys import KEY_PREFIX
from bridge.peft.version import __version__

#: What can be written.
TARGETS = ("peft", "megatron", "torchtune", "mlx")
_PEFT_ENDS = (".lora_A.weight", ".lora_B.weight")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted.

    Attributes:
        source: The format of the input: one of `TARGETS` or `"plain"`.
        target: The format of the output.
        steps: Module by module, how and with what error.
        dim: The one rank of a format that has one rank; None for PEFT.
        alpha: Its alpha.
        base: The model, or its config.json, that the adapter names and the heads come from.
    """

    source: str
    target: str
    steps: list[Step]
    dim: int | None = None
    alpha: float | None = None
    base: Path | None = None


def convert_adapter(
    path: str | Path,
    target: str,
    output: str | Path,
    *,
    layout: AttentionLayout | None = None,
    alpha: float | None = None,
    rank: int | None = None,
) -> Conversion:
    """Read an adapter in any format and write it in another.

    Args:
        path: A directory, or a safetensors file.
        target: One of `TARGETS`.
        output: A directory that does not exist or is empty.
        layout: The model's attention layout, where the formats need it; without it that of the
            file, or of the base model that the adapter's config names.
        alpha: The alpha that a file without a config was trained with.
        rank: For Megatron: approximate what needs a higher rank.

    Returns:
        What was done.

    Raises:
        AdapterError: The input is not right, or the output cannot say it.
    """
    path, output = Path(path), Path(output)
    if target not in TARGETS:
        raise AdapterError(f"cannot write {target!r}; pass one of {', '.join(TARGETS)}")
    if rank is not None and (target != "megatron" or rank < 1):
        raise AdapterError(f"rank={rank}: only Megatron's fused modules are approximated, to >= 1")
    check_new(output)
    with reading(path):
        source, adapter, steps, layout = _read(path, layout, alpha)
    if target == "peft":
        write_adapter(adapter, output)
        return Conversion(source=source, target=target, steps=steps)
    base = _named_base(adapter) if layout is None else None
    layout = layout or (base and AttentionLayout.of_model(base))
    if layout is None:
        raise _no_layout()
    match target:
        case "megatron":
            converted = to_megatron(adapter, layout, rank)
        case "torchtune":
            converted = to_torchtune(adapter, layout)
        case _:
            converted = to_mlx(adapter, layout)
    extra = {"bridge_peft_version": __version__, **converted.extra}
    files = {EXTRA_NAME: json_bytes(extra)}
    if converted.config:
        files[CONFIG_NAME] = json_bytes(converted.config)
    tensors_name = MLX_TENSORS_NAME if target == "mlx" else TENSORS_NAME
    write_files(output, {tensors_name: serialize(converted.tensors), **files})
    return Conversion(
        source=source,
        target=target,
        steps=converted.steps,
        dim=extra["dim"],
        alpha=extra["alpha"],
        base=base,
    )


def detect_format(keys: Collection[str]) -> str:
    """The format whose keys these are: one of `TARGETS` or `"plain"`.

    Args:
        keys: The keys of a state dict.

    Raises:
        AdapterFileError: They are not those of an adapter.
    """
    if any(key.endswith(".adapter.linear_in.weight") and "decoder.layers." in key for key in keys):
        return "megatron"
    if any(key.startswith(KEY_PREFIX) and key.endswith(_PEFT_ENDS) for key in keys):
        return "peft"
    tune = (".attn.", ".mlp.w1.", ".mlp.w2.", ".mlp.w3.")
    if any(
        key.startswith("layers.") and ".lora_a." in key and any(name in key for name in tune)
        for key in keys
    ):
        return "torchtune"
    if any(".lora_" in key or ".linear_in." in key for key in keys):
        return "plain"
    some = ", ".join(repr(key[:60]) for key in list(keys)[:3])
    raise AdapterFileError(f"the file is not an adapter in a known format (keys: {some or 'none'})")


def _read(
    path: Path, layout: AttentionLayout | None, alpha: float | None
) -> tuple[str, AdapterFile, list[Step], AttentionLayout | None]:
    tensors = _read_tensors(path)
    directory = path if path.is_dir() else path.parent
    extra = read_extra(directory)
    if layout is None and "layout" in extra:
        layout = AttentionLayout.from_dict(extra["layout"])
    config = None
    if current_path(directory, CONFIG_NAME).exists():
        warn_if_interrupted(directory)
        config = read_json(checked_path(directory, CONFIG_NAME))
    if config is not None and is_mlx(config):
        adapter, steps = from_mlx(tensors, config, extra, layout)
        return "mlx", _with_alpha(adapter, alpha), steps, layout
    source = detect_format(tensors)
    if source in ("peft", "plain") and config is not None:
        adapter = adapter_from(config, extra, tensors)
        if has_megatron_names(adapter):
            if layout is None:
                raise _no_layout()
            adapter = _with_alpha(adapter, alpha)
            return "megatron", *from_megatron_model(adapter, layout), layout
        how = "unchanged" if source == "peft" else "renamed"
        steps = [Step(name=fqn, how=how) for fqn in adapter.tensors]
        return source, _with_alpha(adapter, alpha), steps, layout
    alpha = _alpha(extra, alpha)
    if source in ("peft", "plain"):
        return "plain", *from_plain(tensors, extra, alpha), layout
    if layout is None:
        raise _no_layout()
    read = from_megatron if source == "megatron" else from_torchtune
    return source, *read(tensors, extra, layout, alpha), layout


def _with_alpha(adapter: AdapterFile, alpha: float | None) -> AdapterFile:
    """The adapter, unless another alpha is given than its config says."""
    says = {adapter.alpha(fqn) for fqn in adapter.tensors}
    if alpha is not None and says != {alpha}:
        raise AdapterError(
            f"alpha {alpha:g} is given, and the adapter's config says "
            f"{', '.join(f'{a:g}' for a in sorted(says)[:5])}; leave it out"
        )
    return adapter


def _named_base(adapter: AdapterFile) -> Path | None:
    """What the adapter's config names as its base, if it is here: a directory, or a cached file."""
    name = adapter.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    with contextlib.suppress(OSError, ValueError, ImportError):
        if (Path(name) / "config.json").is_file():
            return Path(name)
        # here, because it costs time and is optional; it looks into the cache and at no network
        from huggingface_hub import try_to_load_from_cache

        if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
            return Path(cached)
    return None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the input, in one safetensors file or in those of one adapter."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise AdapterFileError(
                f"{path} is not a .safetensors file, and others are not opened (a pickle can run "
                "any program); save it with safetensors.torch.save_file where it was trained"
            )
        return read_tensors(path)
    if not path.is_dir():
        raise AdapterFileError(f"{path} does not exist; pass an adapter's directory or file")
    names = sorted(p.name for p in path.iterdir())
    files = [name for name in names if name.endswith(".safetensors") and name.isprintable()]
    if TENSORS_NAME not in files and MLX_TENSORS_NAME in files:
        files = [MLX_TENSORS_NAME]  # checkpoints of other steps may lie beside it
    if len(files) == 1:
        return read_tensors(checked_path(path, files[0]))
    pickles = not files and any(name.endswith(_PICKLES) for name in names)
    if pickles or (files and not any(name.startswith("adapter_model") for name in files)):
        what = "only pickles, which can run any program" if pickles else "several safetensors files"
        raise AdapterFileError(f"{path} holds {what}; pass the adapter's safetensors file itself")
    return read_adapter_tensors(path)


def _alpha(extra: Mapping[str, Any], alpha: float | None) -> float:
    value = extra.get("alpha") if alpha is None else alpha
    if value is None:
        raise AdapterError("the file does not say its alpha; pass the one it was trained with")
    if not is_number(value) or not 0 < abs(value) < 1e12:
        raise AdapterError(f"alpha is {value!r:.80}; pass the number it was trained with")
    return value


def _no_layout() -> AdapterError:
    return AdapterError(
        "this format needs the number of heads and layers, which the adapter does not say; pass "
        "the base model's directory or its config.json (--model)"
    )
