"""Megatron's fused adapters against the dense weights that they stand for."""

from __future__ import annotations

import pytest
import torch

from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.convert.layout import AttentionLayout
from bridge.peft.formats.convert.megatron import from_megatron, to_megatron
from bridge.peft.formats.peft.adapter_file import AdapterFile
from tests.helpers.formats_llama import ALL, LAYOUT, adapted, base, file_of, updates, with_shared_a

QKV = "decoder.layers.{}.self_attention.linear_qkv"
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def dense_qkv(weights, layout=LAYOUT):
    """The fused weight, head by head: for each group its q heads, its k head, its v head."""
    q, k, v = weights
    d, per_group = layout.head_dim, layout.heads // layout.groups
    rows = []
    for group in range(layout.groups):
        for head in range(group * per_group, (group + 1) * per_group):
            rows.append(q[head * d : (head + 1) * d])
        rows.append(k[group * d : (group + 1) * d])
        rows.append(v[group * d : (group + 1) * d])
    return torch.cat(rows)


def dense_updates(model):
    """What a Megatron model's weights would change by, from the dense update of each linear."""
    delta = updates(file_of(model))

    def of(layer, name):
        linear = base().model.layers[layer].get_submodule(name)
        zero = torch.zeros_like(linear.weight, dtype=torch.float64)
        return delta.get(f"model.layers.{layer}.{name}", zero)

    dense = {}
    for i in range(2):
        qkv = [of(i, f"self_attn.{n}_proj") for n in "qkv"]
        dense[QKV.format(i)] = dense_qkv(qkv)
        dense[f"decoder.layers.{i}.self_attention.linear_proj"] = of(i, "self_attn.o_proj")
        gate_up = [of(i, "mlp.gate_proj"), of(i, "mlp.up_proj")]
        dense[f"decoder.layers.{i}.mlp.linear_fc1"] = torch.cat(gate_up)
        dense[f"decoder.layers.{i}.mlp.linear_fc2"] = of(i, "mlp.down_proj")
    return dense


def megatron_updates(converted):
    """`alpha / dim · B A` of every module, as a Megatron model computes it."""
    scale = converted.extra["alpha"] / converted.extra["dim"]
    result = {}
    for key, a in converted.tensors.items():
        name, _, side = key.partition(".adapter.linear_")
        if side == "in.weight":
            b = converted.tensors[f"{name}.adapter.linear_out.weight"]
            assert a.shape[0] == b.shape[1] == converted.extra["dim"]
            result[name] = scale * b.double() @ a.double()
    return result


def assert_same_tensors(ours, theirs):
    assert ours.tensors.keys() == theirs.tensors.keys()
    for fqn in ours.tensors:
        assert all(map(torch.equal, ours.tensors[fqn], theirs.tensors[fqn])), fqn
        assert ours.scale(fqn) == theirs.scale(fqn)


def back(converted, layout=LAYOUT, extra=None):
    extra = converted.extra if extra is None else extra
    return from_megatron(converted.tensors, extra, layout, converted.extra["alpha"])[0]


RECIPES = {
    "all linears": {},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "up alone": {"target_modules": ["up_proj", "o_proj"]},
    "ranks and powers of two": {
        "rank_pattern": {"k_proj": 2, "down_proj": 5},
        "alpha_pattern": {"k_proj": 8, "down_proj": 10},
    },
    "rank-stabilised": {"use_rslora": True, "dropout": 0.1},
    "one layer": {"target_modules": [f"*.layers.1.*.{name}" for name in ALL]},
}


@pytest.mark.parametrize("name", RECIPES)
def test_stacked_ranks_give_the_dense_update_and_the_way_back_the_same_file(name):
    model = adapted(**RECIPES[name])
    adapter = file_of(model)
    converted = to_megatron(adapter, LAYOUT)
    dense = dense_updates(model)
    for module, update in megatron_updates(converted).items():
        torch.testing.assert_close(update, dense[module], **CLOSE)
    restored = back(converted)
    assert_same_tensors(restored, adapter)
    assert restored.config == adapter.config
    assert restored.extra == adapter.extra


def test_one_a_for_all_parts_keeps_the_rank():
    model = with_shared_a(adapted())
    converted = to_megatron(file_of(model), LAYOUT)
    assert converted.extra["dim"] == 3
    how = {step.name: step.how for step in converted.steps}
    assert how[QKV.format(0)] == how["decoder.layers.1.mlp.linear_fc1"] == "one A, rank 3"
    dense = dense_updates(model)
    for module, update in megatron_updates(converted).items():
        torch.testing.assert_close(update, dense[module], **CLOSE)


def test_it_says_that_ranks_were_stacked():
    steps = {s.name: s for s in to_megatron(file_of(adapted()), LAYOUT).steps}
    assert steps[QKV.format(0)].how == "stacked, rank 9 = 3 + 3 + 3"
    assert steps["decoder.layers.0.self_attention.linear_proj"].how == "renamed"
    assert all(step.error == 0 for step in steps.values())


def fused_file(dtype=torch.float32):
    """An adapter as a Megatron run leaves it: fused, no bridge_adapter.json, DDP's prefixes."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "self_attention.linear_qkv": (64, 32),
        "self_attention.linear_proj": (32, 32),
        "mlp.linear_fc1": (96, 32),
        "mlp.linear_fc2": (32, 48),
    }
    tensors = {}
    for layer in range(2):
        for name, (n_out, n_in) in shapes.items():
            key = f"module.module.decoder.layers.{layer}.{name}.adapter.linear"
            tensors[f"{key}_in.weight"] = torch.randn(4, n_in, generator=generator).to(dtype)
            tensors[f"{key}_out.weight"] = torch.randn(n_out, 4, generator=generator).to(dtype)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_to_separate_is_exact_and_comes_back_bit_for_bit(dtype):
    tensors = fused_file(dtype)
    adapter, _ = from_megatron(tensors, {}, LAYOUT, alpha=10)
    delta = updates(adapter)
    for i in range(2):
        prefix = f"module.module.decoder.layers.{i}.self_attention.linear_qkv.adapter.linear"
        fused = (
            10
            / 4
            * tensors[f"{prefix}_out.weight"].double()
            @ (tensors[f"{prefix}_in.weight"].double())
        )
        parts = [delta[f"model.layers.{i}.self_attn.{n}_proj"] for n in "qkv"]
        torch.testing.assert_close(dense_qkv(parts), fused, **CLOSE)
    again = to_megatron(adapter, LAYOUT)
    assert again.extra["dim"] == 4 and again.extra["alpha"] == 10
    assert {f"module.module.{key}" for key in again.tensors} == tensors.keys()
    assert all(torch.equal(t, tensors[f"module.module.{k}"]) for k, t in again.tensors.items())


def test_short_target_names_only_where_every_layer_is_known_to_be_adapted():
    known, _ = from_megatron(fused_file(), {}, LAYOUT, alpha=10)
    assert known.config["target_modules"] == sorted(ALL)
    unknown = AttentionLayout(heads=4, groups=2, head_dim=8)
    assert len(from_megatron(fused_file(), {}, unknown, 10)[0].config["target_modules"]) == 14
    more = AttentionLayout(heads=4, groups=2, head_dim=8, layers=3)
    assert len(from_megatron(fused_file(), {}, more, 10)[0].config["target_modules"]) == 14


def test_a_stacked_adapter_that_was_trained_further_is_split_at_full_rank():
    converted = to_megatron(file_of(adapted()), LAYOUT)
    key = f"{QKV.format(0)}.adapter.linear_out.weight"
    converted.tensors[key] += 0.25
    extra = {**converted.extra}
    restored = back(converted, extra=extra)
    assert restored.rank("model.layers.0.self_attn.q_proj") == 9
    assert restored.rank("model.layers.1.self_attn.q_proj") == 3
    fused = megatron_updates(converted)[QKV.format(0)]
    delta = updates(restored)
    parts = [delta[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv"]
    torch.testing.assert_close(dense_qkv(parts), fused, **CLOSE)


def test_approximation_happens_only_when_asked_and_reports_its_error():
    model = adapted()
    dense = dense_updates(model)
    converted = to_megatron(file_of(model), LAYOUT, rank=4)
    assert converted.extra["dim"] == 4
    errors = {step.name: step.error for step in converted.steps}
    for module, update in megatron_updates(converted).items():
        error = torch.linalg.norm(update - dense[module]) / torch.linalg.norm(dense[module])
        assert errors[module] == pytest.approx(float(error), rel=1e-3, abs=1e-6)
    assert errors[QKV.format(0)] > 0.01
    # no other matrix of this rank is nearer
    best = torch.linalg.svdvals(dense[QKV.format(0)])[4:].square().sum().sqrt()
    best = float(best / torch.linalg.norm(dense[QKV.format(0)]))
    assert errors[QKV.format(0)] == pytest.approx(best, rel=1e-4)


def test_scales_that_need_rounding_are_refused_unless_asked():
    adapter = file_of(adapted(alpha_pattern={"k_proj": 7}))
    with pytest.raises(AdapterError, match=r"scale 2.33333.*--rank"):
        to_megatron(adapter, LAYOUT)
    converted = to_megatron(adapter, LAYOUT, rank=99)
    assert any("scale folded" in step.how and step.error > 0 for step in converted.steps)
    dense = dense_updates(adapted(alpha_pattern={"k_proj": 7}))
    for module, update in megatron_updates(converted).items():
        torch.testing.assert_close(update, dense[module], **CLOSE)


def test_what_megatron_has_no_place_for_is_refused():
    with pytest.raises(AdapterError, match="lm_head has no counterpart"):
        to_megatron(file_of(adapted(target_modules=["q_proj", "lm_head"])), LAYOUT)
    wrong = AttentionLayout(heads=8, groups=2, head_dim=8)
    with pytest.raises(AdapterError, match="q_proj has 32 rows"):
        to_megatron(file_of(adapted()), wrong)
    trained_head = adapted()
    trained_head.lm_head.weight.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"lm_head.weight is saved in full"):
        to_megatron(file_of(trained_head), LAYOUT)


def _without_half(tensors):
    del tensors["module.module.decoder.layers.0.mlp.linear_fc1.adapter.linear_out.weight"]


def _with_stranger(tensors):
    tensors["decoder.layers.0.mlp.router.adapter.linear_in.weight"] = torch.ones(4, 4)


def _with_twin(tensors):
    key = "decoder.layers.0.mlp.linear_fc1.adapter.linear_out.weight"
    tensors[key] = tensors[f"module.module.{key}"]


def _with_wrong_rows(tensors):
    key = "module.module.decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight"
    tensors[key] = tensors[key][:-1]


@pytest.mark.parametrize("damage", [_without_half, _with_stranger, _with_twin, _with_wrong_rows])
def test_damaged_megatron_files_are_refused(damage):
    tensors = fused_file()
    damage(tensors)
    with pytest.raises(AdapterFileError):
        from_megatron(tensors, {}, LAYOUT, alpha=10)


@pytest.mark.parametrize(
    "extra",
    [
        {"prefix": 3},
        {"parts": []},
        {"parts": {QKV.format(0): {"q_proj": [0, 99, 1.0]}}},
        {"parts": {QKV.format(0): {"q_proj": "all"}}},
        {"parts": {QKV.format(0): {"z_proj": [0, 1, 1.0]}}},
        {"dropout": "much"},
    ],
)
def test_extras_of_wrong_types_are_refused(extra):
    with pytest.raises(AdapterFileError):
        from_megatron(fused_file(), extra, LAYOUT, alpha=10)


def parts(**pairs):
    """An adapter of one layer's linears, from A and B by the end of their names; scale 1."""
    tensors = {f"model.layers.0.{name.replace('__', '.')}": ab for name, ab in pairs.items()}
    rank = {a.shape[0] for a, _ in tensors.values()}.pop()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    return AdapterFile(config=config | {"target_modules": sorted(tensors)}, tensors=tensors)


@pytest.mark.parametrize("shapes", [((2, 32), (2, 24), 48, 48), ((2, 32), (2, 32), 48, 40)])
def test_parts_that_do_not_make_one_linear_are_refused(shapes):
    gate, up, rows, other_rows = shapes
    adapter = parts(
        mlp__gate_proj=(torch.randn(gate), torch.randn(rows, 2)),
        mlp__up_proj=(torch.randn(up), torch.randn(other_rows, 2)),
    )
    with pytest.raises(AdapterError, match="do not make one linear .gate_proj 48×32, up_proj"):
        to_megatron(adapter, LAYOUT)


def test_parts_of_different_dtypes_are_fused_without_loss():
    pairs = [(torch.randn(2, 32), torch.randn(48, 2)) for _ in range(2)]
    gate = tuple(tensor.to(torch.bfloat16) for tensor in pairs[0])
    converted = to_megatron(parts(mlp__gate_proj=gate, mlp__up_proj=pairs[1]), LAYOUT)
    (update,) = megatron_updates(converted).values()
    exact = [b.double() @ a.double() for a, b in (gate, pairs[1])]
    torch.testing.assert_close(update, torch.cat(exact), **CLOSE)


def test_a_scale_that_b_cannot_take_in_its_dtype_is_refused():
    model = adapted(lora_dtype=torch.float16, alpha=3, alpha_pattern={"q_proj": 3 * 2.0**20})
    with pytest.raises(AdapterError, match="q_proj: B times .* overflows torch.float16"):
        to_megatron(file_of(model), LAYOUT)
    model = adapted(lora_dtype=torch.float16, alpha=3, alpha_pattern={"q_proj": 3 * 2.0**-20})
    with pytest.raises(AdapterError, match="q_proj: B times .* underflows torch.float16"):
        to_megatron(file_of(model), LAYOUT)


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000])
def test_a_model_config_of_no_use_is_told(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(AdapterError, match="pass a model's directory"):
        AttentionLayout.of_model(tmp_path)
