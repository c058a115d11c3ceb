"""Parts of fused projections: rows of B that are not chosen stay zero, in training and in files."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from bridge.peft import LoRA, adapter_state_dict, load_adapter, merge, save_adapter
from bridge.peft.errors import AdapterError, TargetError
from bridge.peft.formats.peft import read_adapter, write_adapter
from bridge.peft.model.fused_parts import rows_of_parts
from bridge.peft.resize import resize
from tests.helpers import models, parts, peft_files

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
GPT2 = {"target_modules": ["c_attn", "c_fc"], "parts": {"c_attn": ["q", "v"]}}


def phi3():
    config = transformers.Phi3Config(**models._small(pad_token_id=0))
    return transformers.Phi3ForCausalLM(config)


def neox():
    settings = models._small()
    del settings["num_key_value_heads"]
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**settings))


def bloom():
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    return transformers.BloomForCausalLM(config)


def mpt():
    config = transformers.MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4)
    return transformers.MptForCausalLM(config)


FUSED = {
    "gpt2": (models.gpt2, "c_attn"),
    "phi3": (phi3, "qkv_proj"),
    "neox": (neox, "query_key_value"),
    "bloom": (bloom, "query_key_value"),
    "mpt": (mpt, "Wqkv"),
}


def trained(base, steps=3, **recipe):
    """The base adapted and trained, weight decay and all."""
    model = LoRA(**({"dim": 4, "seed": 1} | recipe))(copy.deepcopy(base))
    models.train_a_little(model, steps)
    return model


def moved_rows(model, name):
    found = {}
    for fqn, tensor in adapter_state_dict(model).items():
        if fqn.endswith(f"{name}.lora_b.weight"):
            found[fqn] = set(tensor.any(1).nonzero().flatten().tolist())
    return found


@pytest.mark.parametrize("name", FUSED)
def test_only_the_chosen_part_moves_what_the_model_makes_of_it(name):
    """With k alone and one key, attention's output cannot change; with v alone it must."""
    make, fused = FUSED[name]
    base = parts.build(make)
    one = torch.tensor([[5]])
    for part, changes in (("q", False), ("k", False), ("v", True)):
        model = LoRA(dim=4, target_modules=[fused], parts={fused: [part]})(copy.deepcopy(base))
        assert (
            torch.equal(parts.logits(parts.moved(model), one), parts.logits(base, one)) != changes
        )
        longer = models.inputs(base)["input_ids"]
        assert not torch.allclose(parts.logits(model, longer), parts.logits(base, longer))


def test_rows_that_are_not_chosen_stay_zero_in_training():
    model = trained(parts.build(models.gpt2), **GPT2)
    for rows in moved_rows(model, "c_attn").values():
        assert rows == {*range(32), *range(64, 96)}
    for rows in moved_rows(model, "c_fc").values():
        assert rows == {*range(128)}


def test_gate_or_up_alone_and_ranges_of_rows():
    model = trained(
        parts.build(phi3),
        target_modules=["qkv_proj", "gate_up_proj"],
        parts={"gate_up_proj": ["up"], "qkv_proj": [(0, 8), (8, 16), (40, 48)]},
    )
    assert set(map(frozenset, moved_rows(model, "gate_up_proj").values())) == {
        frozenset(range(48, 96))
    }
    assert model.model.layers[0].self_attn.qkv_proj.branch_options.rows == ((0, 16), (40, 48))


def test_megatron_s_canonical_form_is_group_by_group():
    config = SimpleNamespace(num_attention_heads=4, num_query_groups=2)
    model = SimpleNamespace(config=config)
    rows = {p: rows_of_parts(model, "a.linear_qkv", 64, [p]) for p in ("q", "k", "v")}
    assert rows == {"q": ((0, 16), (32, 48)), "k": ((16, 24), (48, 56)), "v": ((24, 32), (56, 64))}
    assert rows_of_parts(model, "linear_qkv", 64, ["v", "k", "q"]) == ((0, 64),)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"c_attn": ["x"]}, "has no part 'x', only 'q', 'k', 'v'"),
        ({"c_fc": ["q"]}, "not known for this type of model; pass ranges"),
        ({"c_attn": [(0, 97)]}, "not of the 96"),
        ({"c_attn": ["q", (31, 40)]}, "overlap others"),
        ({"c_atn": ["q"]}, "parts entry 'c_atn' matches none"),
        ({"wte": ["q"]}, "is a Embedding, of which parts"),
    ],
)
def test_what_is_no_part_is_refused_before_anything_is_touched(chosen, words):
    model = models.gpt2()
    with pytest.raises(TargetError, match=words):
        LoRA(target_modules=["c_attn", "c_fc", "wte"], parts=chosen)(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", ["q", {"c_attn": "q"}, {"c_attn": []}, {"c_attn": [(3, 1)]}])
def test_a_value_that_names_no_parts_is_refused(value):
    with pytest.raises(AdapterError, match="parts"):
        LoRA(parts=value)


def test_plan_says_how_many_rows():
    plan = LoRA(dim=4, **GPT2).plan(models.gpt2())
    assert plan.rows[0].trained_rows == 64 and plan.rows[1].trained_rows == 128
    assert "64 of 96×32" in str(plan)


@pytest.mark.parametrize("name", FUSED)
def test_peft_reads_ours_and_a_merge_is_exact(tmp_path, name):
    make, fused = FUSED[name]
    base = parts.build(make)
    model = trained(base, target_modules=[fused], parts={fused: ["q", "v"]})
    save_adapter(model, tmp_path)
    theirs = parts.read_by_peft(base, tmp_path)
    expected = parts.logits(model)
    torch.testing.assert_close(parts.logits(theirs), expected, **CLOSE)
    merge(model)
    torch.testing.assert_close(parts.logits(model), expected, **CLOSE)


def test_loaded_the_rows_stay_zero_when_training_goes_on(tmp_path):
    base = parts.build(models.gpt2)
    model = trained(base, **GPT2)
    save_adapter(model, tmp_path)
    extra = json.loads((tmp_path / "bridge_adapter.json").read_text())
    assert [[0, 32], [64, 96]] in [
        extra.get("rows"),
        *(e["rows"] for e in extra["exceptions"].values()),
    ]
    again = load_adapter(copy.deepcopy(base), tmp_path)
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(adapter_state_dict(again)[name], tensor), name
    before = adapter_state_dict(again)["transformer.h.0.attn.c_attn.lora_b.weight"].clone()
    models.train_a_little(again)
    after = adapter_state_dict(again)["transformer.h.0.attn.c_attn.lora_b.weight"]
    assert not torch.equal(after, before)
    for rows in moved_rows(again, "c_attn").values():
        assert rows == {*range(32), *range(64, 96)}
    assert all(len(rows) == 128 for rows in moved_rows(again, "c_fc").values())


def test_a_file_whose_b_says_otherwise_is_refused(tmp_path):
    save_adapter(trained(parts.build(models.gpt2), **GPT2), tmp_path)
    for rows, words in (
        ([[0, 8]], "others that are not zero"),
        ([[0, 9999]], "others that are not zero"),
        ([[8, 0]], "rows must be"),
        ("all", "rows must be"),
    ):
        extra = {"rows": rows}
        (tmp_path / "bridge_adapter.json").write_text(json.dumps(extra))
        with pytest.raises(AdapterError, match=words):
            read_adapter(tmp_path)


@pytest.mark.parametrize("dim", [2, 6])
def test_resized_the_other_rows_are_zero_still(tmp_path, dim):
    base = parts.build(models.gpt2)
    save_adapter(trained(base, **GPT2), tmp_path / "a")
    smaller, _ = resize(read_adapter(tmp_path / "a"), dim)
    write_adapter(smaller, tmp_path / "b")
    model = load_adapter(base, tmp_path / "b")
    for rows in moved_rows(model, "c_attn").values():
        assert rows <= {*range(32), *range(64, 96)}


def test_meta_and_copies_keep_the_rows():
    with torch.device("meta"):
        model = LoRA(dim=2, **GPT2)(models.gpt2())
    model.to_empty(device="cpu")
    layer = copy.deepcopy(model.transformer.h[0].attn.c_attn)
    assert layer.lora_b.mask.any(1).nonzero().flatten().tolist() == [*range(32), *range(64, 96)]
    nn.init.ones_(layer.lora_b.weight)
    assert layer.lora_b.values.sum() == 64 * 2


def test_peft_s_own_files_have_no_such_rows(tmp_path):
    base = parts.build(models.gpt2)
    peft_files.saved_by_peft(copy.deepcopy(base), tmp_path, target_modules=["c_attn"])
    model = load_adapter(base, tmp_path)
    assert model.transformer.h[0].attn.c_attn.branch_options.rows is None
