"""Checks of an adapted model: what is trained, what it computes, what a merge would lose.

They compute with stand-ins for A and B, set for a moment and put back, the same tensors in the
same storage; gradients come from `torch.autograd.grad`, so no `.grad` is touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.quantised.table import format_of
from bridge.peft.branch.token_rows import WithTokenRows
from bridge.peft.doctor.report import Check, some, verdict
from bridge.peft.doctor.sample_inputs import sample_inputs
from bridge.peft.dtypes import TRAINABLE_DTYPES, dtype_name
from bridge.peft.errors import AdapterError
from bridge.peft.formats.peft import read_adapter, write_adapter
from bridge.peft.formats.peft.describe import adapter_of
from bridge.peft.merging.report import LOST
from bridge.peft.merging.weight import merge_weight
from bridge.peft.model.disable import disable_adapters
from bridge.peft.model.participation import Watch
from bridge.peft.model.trained_parameters import has_replaced, original_parameters
from bridge.peft.model.walk import adapter_parameters
from bridge.peft.ops.magnitude import row_squares
from bridge.peft.parallel.fsdp import reshard, sharded_modules
from bridge.peft.tensors import all_finite, is_plain, is_sharded

Layers = dict[str, LoRAMixin]
_ROWS = 4


def model_checks(model: nn.Module, layers: Layers, inputs: Mapping[str, Any] | None) -> list[Check]:
    """Check an adapted model, not wrapped, that is left exactly as it was."""
    if merged := [fqn for fqn, layer in layers.items() if layer.merged]:
        fix = "unmerge(model) first"
        return [Check("state", "warn", f"merged: {some(merged, len(layers))}", fix)]
    if off := [fqn for fqn, layer in layers.items() if not layer.adapter_enabled]:
        fix = "leave disable_adapters first"
        return [Check("state", "warn", f"switched off: {some(off, len(layers))}", fix)]
    if sharded_modules(model) or any(is_sharded(layer.base_weight) for layer in layers.values()):
        fix = "check the saved adapter on the unsharded base"
        return [Check("state", "warn", "sharded: no layer can be called by itself", fix)]
    checks = [_frozen(model, layers), _dtypes(layers), _devices(layers), _finite_base(layers)]
    if failed := [check.name for check in checks[1:] if check.status == "fail"]:
        return [*checks, Check("forward and backward", "skip", f"see {' and '.join(failed)}")]
    with _left_as_it_was(model):
        model.eval()
        checks += [_no_op(layers), _gradients(layers), _all_of_the_model(model, layers, inputs)]
    return [*checks, _save_and_load(model, layers), _merge_forecast(layers)]


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def _b_set_to(layers: Layers, value: str) -> Iterator[None]:
    """Within the context every B is zero or random; afterwards the same tensors are back.

    DoRA's magnitudes are those of a fresh adapter. With a random B, an A that is zero (an
    embedding's, at the start) is random too.
    """
    weights = [layer.lora_b.weight for layer in layers.values()]
    if value == "random":
        matrices = [layer.lora_a.weight for layer in layers.values()]
        weights += [a for a in matrices if not bool(a.any())]
    magnitudes = [m for layer in layers.values() if (m := layer.magnitude) is not None]
    weights += [m.weight for m in magnitudes]
    weights += [layer.start.b for layer in layers.values() if layer.start is not None]
    kept = [weight.data for weight in weights]
    try:
        for weight in weights:
            zeros = torch.zeros_like(weight.data)
            weight.data = zeros if value == "zero" else zeros.normal_(std=0.02)
        for layer in layers.values():
            if layer.magnitude is not None:
                layer.magnitude.set_to(row_squares(layer.dense_weight()).sqrt())
        yield
    finally:
        for weight, data in zip(weights, kept, strict=True):
            weight.data = data


@contextmanager
def _others_off(model: nn.Module) -> Iterator[None]:
    """Within the context what is trained beside A and B, and is not zero at first, takes no part.

    Token rows, and modules that are trained in full.
    """
    modules = [m for m in model.modules() if isinstance(m, WithTokenRows)]
    for module in modules:
        module.adapter_enabled = False
    if any(map(has_replaced, model.modules())):
        reshard(model)
    try:
        with ExitStack() as stack:
            for module in model.modules():
                stack.enter_context(original_parameters(module))
            yield
    finally:
        for module in modules:
            module.adapter_enabled = True


def _frozen(model: nn.Module, layers: Layers) -> Check:
    name = "what is trained"
    own = {id(p) for _, p in adapter_parameters(model)}
    idle = [f for f, m in layers.items() if not all(p.requires_grad for p in _trained(m))]
    if idle:
        fix = "requires_grad_(True) on lora_a and lora_b of these modules"
        return Check(name, "fail", f"A or B is frozen in {some(idle, len(layers))}", fix)
    own |= {id(p) for m in model.modules() if has_replaced(m) for p in m._parameters.values()}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        detail = f"{len(others)} base parameters are trained too (first: {others[0]})"
        return Check(name, "warn", detail, "freeze them, unless they are meant to be trained")
    return Check(name, "pass", f"A and B of {len(layers)} modules; the base is frozen")


def _dtypes(layers: Layers) -> Check:
    name = "dtypes"
    mixed = [f for f, m in layers.items() if len({p.dtype for p in _ab(m)}) > 1]
    if mixed:
        fix = "cast lora_a and lora_b to one dtype"
        return Check(name, "fail", f"A and B differ in {some(mixed, len(layers))}", fix)
    half = [f for f, m in layers.items() if m.lora_a.weight.dtype == torch.float16]
    if half:
        detail = f"A and B are float16 in {some(half, len(layers))}"
        return Check(name, "warn", detail, "train with lora_dtype=torch.float32 or torch.bfloat16")
    names = sorted({dtype_name(m.lora_a.weight.dtype) for m in layers.values()})
    return Check(name, "pass", f"A and B are {' and '.join(names)}")


def _devices(layers: Layers) -> Check:
    at = {fqn: layer.base_weight.device for fqn, layer in layers.items()}
    apart = [fqn for fqn, m in layers.items() if any(p.device != at[fqn] for p in _ab(m))]
    fix = "model.to(device) moves base and adapter together"
    good = f"A and B beside the base on {', '.join(sorted(set(map(str, at.values()))))}"
    return verdict("devices", apart, len(layers), "away from the base in", fix, good=good)


def _finite_base(layers: Layers) -> Check:
    name = "NaN and inf in the base"
    parts = {f: tensors for f, m in layers.items() if (tensors := _values_of_base(m))}
    if not parts:
        return Check(name, "skip", "the base is sharded")
    bad = [fqn for fqn, tensors in parts.items() if not all(map(all_finite, tensors))]
    fix = "download or load the base model again"
    good = f"all weights of {len(parts)} modules are finite"
    return verdict(name, bad, len(parts), "not finite in", fix, good=good)


def _values_of_base(layer: LoRAMixin) -> list[Tensor]:
    """The weight, or of a quantised one the scales; empty if neither is at hand."""
    if (form := format_of(layer)) is not None:
        tensors = form.tensors(form.packed(layer))
        return [t for t in tensors if t.dtype in TRAINABLE_DTYPES and not t.is_meta]
    return [layer.base_weight] if _is_ordinary(layer.base_weight) else []


def _no_op(layers: Layers) -> Check:
    differ: list[str] = []
    with torch.no_grad(), _b_set_to(layers, "zero"):
        for fqn, layer in layers.items():
            x = layer.sample_input(_ROWS)
            with_branch = _first(layer(x))
            with disable_adapters(layer):
                if not torch.equal(with_branch, _first(layer(x))):
                    differ.append(fqn)
    fix = "the base's forward is not deterministic in evaluation"
    good = "with B = 0 every layer gives its base's output, bit for bit"
    found = "with B = 0 the output is not the base's in"
    return verdict("no-op at the start", differ, len(layers), found, fix, good=good)


def _gradients(layers: Layers) -> Check:
    missing: list[str] = []
    with torch.enable_grad(), _b_set_to(layers, "random"):
        for fqn, layer in layers.items():
            loss = _first(layer(layer.sample_input(_ROWS))).float().square().sum()
            wanted = _trained(layer)
            trained = all(p.requires_grad for p in wanted) and loss.requires_grad
            if not trained or not _all_reached(
                torch.autograd.grad(loss, wanted, allow_unused=True)
            ):
                missing.append(fqn)
    fix, good = "its forward is bypassed or detached", f"reach A and B of all {len(layers)} modules"
    found = "A or B gets none in"
    return verdict("gradients of the layers", missing, len(layers), found, fix, good=good)


def _all_of_the_model(model: nn.Module, layers: Layers, inputs: Mapping[str, Any] | None) -> Check:
    name = "forward and backward of the model"
    if inputs is None and not hasattr(model, "config"):
        return Check(name, "skip", "no model of transformers: pass doctor(model, inputs={…})")
    weights = [p for layer in layers.values() for p in _trained(layer) if p.requires_grad]
    try:
        inputs = sample_inputs(model) if inputs is None else inputs
        with_branches, base, gradients = _runs(model, layers, inputs, weights)
    except Exception as error:
        # a model's forward fails in ways of its own on a sample not meant for it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Check(name, "skip", f"it does not run on its sample inputs: {reason:.80}")
    if not torch.equal(with_branches, base):
        fix = "a replaced parameter or a hook differs between the two; see disable_adapters"
        return Check(name, "fail", "with B = 0 the output is not the disabled model's", fix)
    reached = {id(p) for p, g in zip(weights, gradients, strict=True) if _all_reached([g])}
    missing = [f for f, m in layers.items() if not all(id(p) in reached for p in _trained(m))]
    if bypassed := [fqn for fqn in missing if layers[fqn].bypassed]:
        detail = f"never called, though the module around it ran: {some(bypassed, len(layers))}"
        return Check(name, "fail", detail, "leave them out of target_modules: exclude_modules")
    if missing:
        detail = f"no gradient reaches {some(missing, len(layers))}"
        return Check(name, "warn", detail, "the model does not use these modules on its own sample")
    return Check(name, "pass", "disabled it is its base bit for bit; gradients reach every A and B")


def _runs(
    model: nn.Module, layers: Layers, inputs: Mapping[str, Any], weights: list[nn.Parameter]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """The output with B = 0, that of the disabled model, and gradients with random B."""
    watch = Watch(model, layers)
    try:
        with torch.no_grad(), _b_set_to(layers, "zero"):
            with warnings.catch_warnings(), _others_off(model):
                warnings.simplefilter("ignore")  # what the watch finds is this check's own result
                with_branches = _first(model(**inputs))
            with disable_adapters(model):
                base = _first(model(**inputs))
    finally:
        watch.stop()
    with torch.enable_grad(), _b_set_to(layers, "random"):
        loss = _first(model(**inputs)).float().square().mean()
        # in here: backward reads the B that is in place when it runs
        gradients = torch.autograd.grad(loss, weights, allow_unused=True) if weights else ()
    return with_branches, base, gradients


def _save_and_load(model: nn.Module, layers: Layers) -> Check:
    name = "save and load"
    with TemporaryDirectory() as directory:
        try:
            # by every rank into its own directory, which `save_adapter` would not do
            again = read_adapter(write_adapter(adapter_of(model), Path(directory)))
        except AdapterError as error:
            return Check(name, "fail", str(error), "this model cannot be saved as it is")
    mine = adapter_of(model)
    pairs = [(again.tensors.get(fqn), pair) for fqn, pair in mine.tensors.items()]
    pairs += [((again.magnitudes.get(f),), (m,)) for f, m in mine.magnitudes.items()]
    pairs += [((again.tokens.get(f),), (rows,)) for f, rows in mine.tokens.items()]
    same = len(again.tensors) + len(again.magnitudes) + len(again.tokens) == len(pairs)
    if same and all(_are_equal(loaded, saved) for loaded, saved in pairs):
        return Check(name, "pass", "every tensor and scale comes back bit for bit")
    return Check(name, "fail", "tensors differ", "please report this with the model's name")


def _are_equal(loaded: Sequence[Tensor | None] | None, saved: Sequence[Tensor]) -> bool:
    return loaded is not None and all(
        t is not None and torch.equal(t, other.cpu())
        for t, other in zip(loaded, saved, strict=True)
    )


def _merge_forecast(layers: Layers) -> Check:
    name = "merge forecast"
    whole = {f: m for f, m in layers.items() if _is_mergeable(m)}
    if not whole:
        return Check(name, "skip", "the base weights are sharded, computed or on meta")
    unchanged = {f: _forecast(m) for f, m in whole.items()}
    lost = [fqn for fqn, share in unchanged.items() if share > LOST]
    fix = "serve unmerged, or merge into float32 weights"
    good = f"rounding would leave at most {max(unchanged.values()):.1%} of a layer unchanged"
    found = "rounding would lose more than half of the update in"
    return verdict(name, lost, len(whole), found, fix, good=good, status="warn")


def _forecast(layer: LoRAMixin) -> float:
    """The share of the update that a merge would lose; of a quantised base in bfloat16."""
    weight = layer.dense_weight()
    return merge_weight(
        weight,
        *layer.factors(),
        layer.scale,
        magnitude=layer.magnitude and layer.magnitude.weight,
        dtype=torch.bfloat16 if format_of(layer) is not None else None,
    )[1].unchanged


def _is_mergeable(layer: LoRAMixin) -> bool:
    if format_of(layer) is not None:
        return all(map(all_finite, _ab(layer)))
    own = layer.weight_name in layer.base._parameters and _is_ordinary(layer.base_weight)
    return own and layer.is_linear() and all(map(all_finite, _ab(layer)))


def _is_ordinary(weight: Tensor) -> bool:
    """Whether a weight is not quantised, sharded or on `meta`."""
    return is_plain(weight) and weight.dtype in TRAINABLE_DTYPES and not weight.is_meta


def _ab(layer: LoRAMixin) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_a.weight, layer.lora_b.weight


def _trained(layer: LoRAMixin) -> list[nn.Parameter]:
    """What of a layer is meant to be trained: A, unless it is frozen by its options, B, and m."""
    frozen = ["lora_start.a", "lora_start.b"]
    if layer.branch_options.freeze_a:
        frozen.append("lora_a.weight")
    return [p for name, p in layer.adapter_parameters().items() if name not in frozen]


def _first(output: Any) -> Tensor:
    """The tensor that stands first in what a module returns."""
    while not isinstance(output, Tensor):
        output = output[0] if isinstance(output, tuple | list) else next(iter(output.values()))
    return output


def _all_reached(gradients: Any) -> bool:
    return all(g is not None and bool(torch.isfinite(g).all()) and bool(g.any()) for g in gradients)
