"""Resizing: the nearest update of a lower rank, the very same function at a higher one."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.peft import AdapterError, LoRA, load_adapter, save_adapter
from bridge.peft.formats.peft import AdapterFile, read_adapter, write_adapter
from bridge.peft.low_rank import kept_energy
from bridge.peft.resize import resize
from tests.helpers import models


def one_module(a, b, **more):
    config = {"peft_type": "LORA", "r": a.shape[0], "lora_alpha": 8, "target_modules": ["q"]}
    return AdapterFile(config=config | more, tensors={"layer.q": (a, b)})


def update(adapter, fqn="layer.q"):
    a, b = adapter.tensors[fqn]
    return adapter.scale(fqn) * (b.double() @ a.double())


def matrices(n_out, n_in, rank, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, n_in, generator=generator)
    return a.to(dtype), torch.randn(n_out, rank, generator=generator).to(dtype)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 10),
    st.integers(1, 14),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_rank_to_any_other_is_the_truncated_svd_of_the_product(
    n_out, n_in, rank, new, use_rslora, seed
):
    old = one_module(*matrices(n_out, n_in, rank, seed), use_rslora=use_rslora)
    resized, report = resize(old, new)
    a, b = resized.tensors["layer.q"]
    assert (a.shape, b.shape) == ((new, n_in), (n_out, new))
    assert resized.scale("layer.q") == pytest.approx(old.scale("layer.q"), rel=1e-15)
    u, s, vt = torch.linalg.svd(update(old), full_matrices=False)
    nearest = (u[:, :new] * s[:new]) @ vt[:new]
    torch.testing.assert_close(update(resized), nearest, rtol=1e-4, atol=1e-4 * float(s[0]))
    energy = float(s[:new].square().sum() / s.square().sum())
    assert report.rows[0].energy == pytest.approx(energy, abs=1e-9)
    if new >= rank:
        assert report.rows[0].energy == 1


@pytest.mark.parametrize("new", [4, 7, 64])
def test_a_higher_rank_is_the_same_function_bit_for_bit_and_trains_on(new):
    old = one_module(*matrices(16, 12, 4))
    resized, _ = resize(old, new)
    (a, b), (old_a, old_b) = resized.tensors["layer.q"], old.tensors["layer.q"]
    assert torch.equal(a[:4], old_a)
    assert torch.equal(b[:, :4], old_b)
    assert not b[:, 4:].any()
    assert bool((a[4:].abs().sum(1) > 0).all())


def test_new_rows_of_a_depend_on_the_seed_and_the_name_alone():
    old = one_module(*matrices(16, 12, 4))
    first, again, other = (resize(old, 6, seed=seed)[0].tensors["layer.q"][0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first[4:], other[4:])


def test_the_adapter_given_is_not_changed():
    old = one_module(*matrices(16, 12, 4))
    before = copy.deepcopy((old.config, old.tensors))
    resize(old, 2)
    assert old.config == before[0]
    for one, other in zip(old.tensors["layer.q"], before[1]["layer.q"], strict=True):
        assert torch.equal(one, other)


def test_every_module_keeps_its_scale_whatever_its_rank_and_alpha_were(tmp_path):
    recipe = LoRA(
        dim=4, alpha=6, rank_pattern={"q_proj": 8, "gate_proj": 2}, alpha_pattern={"v_proj": 5}
    )
    model = recipe(models.llama())
    save_adapter(model, tmp_path / "old")
    old = read_adapter(tmp_path / "old")
    resized, report = resize(old, 3)
    write_adapter(resized, tmp_path / "new")
    new = read_adapter(tmp_path / "new")
    assert new.config["r"] == 3
    assert not new.config["rank_pattern"]
    for fqn in old.tensors:
        assert new.rank(fqn) == 3
        assert new.scale(fqn) == pytest.approx(old.scale(fqn), rel=1e-15)
    assert {row.old_dim for row in report.rows} == {2, 4, 8}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("new", [2, 6])
def test_dtypes_stay(dtype, new):
    resized, _ = resize(one_module(*matrices(16, 12, 4, dtype=dtype)), new)
    assert {t.dtype for t in resized.tensors["layer.q"]} == {dtype}


def test_a_resized_adapter_computes_the_same_in_a_model(tmp_path):
    model = LoRA(dim=4, seed=1)(models.llama()).eval()
    base = models.llama()
    base.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "lora_b"):
                low = torch.randn(layer.lora_b.weight.shape[0], 1) @ torch.randn(1, 4)
                layer.lora_b.weight.copy_(low * 0.1)  # of rank one, so nothing is lost
    save_adapter(model, tmp_path / "old")
    resized, report = resize(read_adapter(tmp_path / "old"), 1)
    assert min(row.energy for row in report.rows) > 1 - 1e-9
    write_adapter(resized, tmp_path / "new")
    loaded = load_adapter(base, tmp_path / "new").eval()
    batch = models.inputs(model)
    with torch.no_grad():
        wanted = model(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, wanted, rtol=1e-4, atol=1e-5)


def test_energy_of_a_zero_update_is_kept():
    a, b = matrices(8, 6, 4)
    assert kept_energy(a, torch.zeros_like(b), 2) == 1
    resized, report = resize(one_module(a, torch.zeros_like(b)), 2)
    assert not update(resized).any()
    assert report.rows[0].energy == 1


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_ranks_that_are_none_are_refused(rank):
    with pytest.raises(AdapterError, match="rank must be an integer >= 1"):
        resize(one_module(*matrices(8, 6, 4)), rank)


def test_report_names_the_module_that_lost_most():
    a, b = torch.eye(2, 6), torch.zeros(8, 2)
    b[0, 0], b[1, 1] = 2.0, 1.0
    _, report = resize(one_module(a, b), 1)
    assert report.rows[0].energy == pytest.approx(0.8)
    text = str(report)
    assert "80.0000%" in text
    assert f"{math.sqrt(0.2):.2e}" in text
    assert text.endswith("least energy kept: 80.0000% in layer.q")
    assert "least" not in str(resize(one_module(a, b), 2)[1])
    assert report.to_dict()["rows"][0]["dim"] == 1


def test_a_rank_that_no_file_may_have_is_refused_at_once():
    with pytest.raises(AdapterError, match="rank is 1000000000000, and 65536 is the largest"):
        resize(one_module(*matrices(4, 4, 2)), 10**12)


def test_a_rank_above_what_a_module_can_use_is_said():
    adapter = one_module(*matrices(8, 6, 4))
    said = "rank 7 is more than 1 modules can use; 6 holds every update of layer.q"
    assert said in str(resize(adapter, 7)[1])
    assert "can use" not in str(resize(adapter, 6)[1])
