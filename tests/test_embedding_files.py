"""Adapted embeddings and output heads, tied or not, in files and merged; PEFT is the judge."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bridge.peft import LoRA, adapter_state_dict, load_adapter, merge, save_adapter, unmerge
from bridge.peft.cli.inspect import describe
from bridge.peft.errors import AdapterError
from bridge.peft.formats.convert.adapters import convert_adapter
from bridge.peft.formats.peft import read_adapter
from bridge.peft.merging.directory import merge_directory
from bridge.peft.resize import resize
from tests.helpers import models, parts, peft_files

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
MODELS = {"llama": models.llama, "gemma3": parts.gemma3, "gpt2": models.gpt2}
TARGETS = {"gpt2": ["wte", "wpe", "c_attn"]}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
TIES = pytest.mark.parametrize("tied", [False, True])


def targets(name):
    return TARGETS.get(name, ["embed_tokens", "q_proj"])


def saved(path, make=models.llama, *, recipe=None, **config):
    """A base and its adapted copy, each in its directory."""
    base = parts.build(make, **config)
    base.save_pretrained(path / "base")
    model = parts.adapted(base, **(recipe or {"target_modules": ["embed_tokens", "q_proj"]}))
    save_adapter(model, path / "adapter")
    return base, model


@pytest.mark.parametrize("name", MODELS)
@TIES
def test_peft_reads_ours(tmp_path, name, tied):
    base = parts.build(MODELS[name], tie_word_embeddings=tied)
    recipe = {"rank_pattern": {targets(name)[0]: 3}, "use_rslora": True}
    ours = parts.adapted(base, target_modules=targets(name), **recipe)
    save_adapter(ours, tmp_path)
    theirs = parts.read_by_peft(base, tmp_path)
    torch.testing.assert_close(parts.logits(theirs), parts.logits(ours), **CLOSE)


@pytest.mark.parametrize("name", MODELS)
@TIES
@pytest.mark.filterwarnings("ignore:.*shares its weight")
def test_we_read_peft_s(tmp_path, name, tied):
    base = parts.build(MODELS[name], tie_word_embeddings=tied)
    theirs = peft_files.saved_by_peft(
        copy.deepcopy(base), tmp_path, target_modules=targets(name), init_lora_weights=False
    )
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(parts.logits(ours), parts.logits(theirs), **CLOSE)
    assert not any(p.requires_grad for p in ours.parameters() if p.shape == (64, 32))


def test_the_file_has_peft_s_keys_and_shapes(tmp_path):
    saved(tmp_path)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {k: tuple(t.shape) for k, t in stored.items() if "embed_tokens" in k}
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    assert shapes == {f"{prefix}A": (4, 64), f"{prefix}B": (32, 4)}
    file = read_adapter(tmp_path / "adapter")
    assert file.embeddings == {"model.embed_tokens"}
    (module,) = [m for m in describe(file)["modules"] if "embed" in m["fqn"]]
    assert module["shape"] == [32, 64] and not module["dead"]


def test_ours_comes_back_bit_for_bit(tmp_path):
    base, model = saved(tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path / "adapter", strict=True)
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(adapter_state_dict(again)[name], tensor), name
    load_adapter(again, tmp_path / "adapter")  # the same model takes the values again


def test_a_file_of_another_vocabulary_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(AdapterError, match="32×70.*and 32×64"):
        load_adapter(parts.build(models.llama, vocab_size=70), tmp_path / "adapter")


def test_a_bare_state_dict_becomes_a_file_that_peft_reads(tmp_path):
    base, model = saved(tmp_path)
    from safetensors.torch import save_file

    (tmp_path / "bare").mkdir()
    save_file(adapter_state_dict(model), tmp_path / "bare" / "adapter_model.safetensors")
    convert_adapter(tmp_path / "bare", "peft", tmp_path / "out", alpha=32)
    theirs = parts.read_by_peft(base, tmp_path / "out")
    torch.testing.assert_close(parts.logits(theirs), parts.logits(model), **CLOSE)


@pytest.mark.parametrize("dim", [2, 6])
def test_resized_it_is_the_same_or_the_nearest_and_new_rows_start_at_zero(tmp_path, dim):
    saved(tmp_path)
    file = read_adapter(tmp_path / "adapter")
    other, _ = resize(file, dim)
    (a, b), (old_a, old_b) = (f.tensors["model.embed_tokens"] for f in (other, file))
    assert a.shape == (dim, 64)
    if dim == 6:
        torch.testing.assert_close(b @ a, old_b @ old_a)
        assert not a[4:].any() and b[:, 4:].any()


def test_a_tied_embedding_is_told_of_and_a_tied_head_computes_apart():
    base = parts.build(models.llama, **TIED)
    with pytest.warns(UserWarning, match=r"embed_tokens: shares its weight with lm_head"):
        LoRA(target_modules=["embed_tokens", "lm_head"])(copy.deepcopy(base))
    LoRA(target_modules=["lm_head"])(base)  # without a warning


def test_merge_is_exact_and_unmerge_restores_bit_for_bit():
    base = parts.build(models.llama, **UNTIED)
    model = parts.adapted(base, target_modules=["embed_tokens", "lm_head"])
    expected = parts.logits(model)
    report = merge(model)
    assert {row.fqn for row in report.rows} == {"model.embed_tokens", "lm_head"}
    assert report.notes == ()
    torch.testing.assert_close(parts.logits(model), expected, **CLOSE)
    unmerge(model)
    assert torch.equal(parts.logits(model), expected)
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)


TIED_TARGETS = pytest.mark.parametrize(
    "adapted", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]
)


@TIED_TARGETS
def test_merging_a_tied_end_says_what_it_unties_and_the_config_says_so(tmp_path, adapted):
    base = parts.build(models.llama, **TIED)
    model = parts.adapted(base, target_modules=adapted)
    expected = parts.logits(model)
    with pytest.raises(AdapterError, match="untie=True"):
        merge(model)
    report = merge(model, untie=True)
    assert all("no longer tied" in note for note in report.notes) and report.notes
    torch.testing.assert_close(parts.logits(model), expected, **CLOSE)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(parts.logits(again), expected, **CLOSE)


@TIED_TARGETS
@pytest.mark.parametrize("name", MODELS)
def test_a_tied_directory_is_untied_on_request(tmp_path, name, adapted):
    if name == "gpt2":
        adapted = ["wte" if target == "embed_tokens" else target for target in adapted]
    recipe = {"target_modules": adapted}
    _, model = saved(tmp_path, MODELS[name], recipe=recipe, **TIED)
    call = (tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    with pytest.raises(AdapterError, match="--untie"):
        merge_directory(*call)
    report = merge_directory(*call, untie=True)
    assert any("no longer tied" in note for note in report.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(parts.logits(merged), parts.logits(model), **CLOSE)


@pytest.mark.parametrize("size", [64, 32])
def test_an_untied_directory_is_merged(tmp_path, size):
    """With as many tokens as features only the file says that it is an embedding."""
    recipe = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    _, model = saved(tmp_path, recipe=recipe, vocab_size=size, **UNTIED)
    adapter = [(tmp_path / "adapter", 1.0)]
    report = merge_directory(tmp_path / "base", adapter, tmp_path / "out")
    assert not report.notes
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[1, 2, 31]])
    torch.testing.assert_close(parts.logits(merged, ids), parts.logits(model, ids), **CLOSE)


@pytest.mark.parametrize("grown", [False, True])
def test_the_base_weights_in_peft_s_file_are_merged_into(tmp_path, grown):
    """PEFT saves the embedding beside its update; it may be that of a larger vocabulary."""
    base = parts.build(models.llama, **UNTIED)
    base.save_pretrained(tmp_path / "base")
    if grown:
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(70, mean_resizing=False)
    theirs = peft_files.saved_by_peft(
        base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head", "q_proj"]
    )
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("embed_tokens.base_layer" in key for key in stored)
    adapter = [(tmp_path / "adapter", 1.0)]
    report = merge_directory(tmp_path / "base", adapter, tmp_path / "out")
    assert any("in full" in note for note in report.notes) == grown
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == (70 if grown else 64)
    torch.testing.assert_close(parts.logits(merged), parts.logits(theirs), **CLOSE)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_as_target_in_peft_and_here(tmp_path, tied):
    base = parts.build(models.llama, tie_word_embeddings=tied)
    ours = parts.adapted(base, target_modules=["q_proj", "lm_head"])
    save_adapter(ours, tmp_path / "ours")
    read = parts.read_by_peft(base, tmp_path / "ours")
    torch.testing.assert_close(parts.logits(read), parts.logits(ours), **CLOSE)
    theirs = peft_files.saved_by_peft(
        copy.deepcopy(base),
        tmp_path / "theirs",
        target_modules=["q_proj", "lm_head"],
        init_lora_weights=False,
    )
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(parts.logits(loaded), parts.logits(theirs), **CLOSE)
