"""Which tensor of a checkpoint an adapter means: prefixes, ties, orientation, whole tensors."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bridge.peft import AdapterError, merge, save_adapter
from bridge.peft.formats.peft import AdapterFile, read_adapter, write_adapter
from bridge.peft.merging.directory import merge_directory
from tests.helpers import models
from tests.helpers.directories import case, load, logits, run, tensors, trained, with_whole_tensor

transformers.utils.logging.disable_progress_bar()
BF16 = torch.bfloat16


def test_summed_adapters_must_be_of_one_base_and_bring_no_whole_tensors(tmp_path):
    files = case(tmp_path)
    wide = trained(models.llama(intermediate_size=64), target_modules=["up_proj"])
    save_adapter(wide, tmp_path / "wide")
    with pytest.raises(AdapterError, match="only adapters of the same base can be summed"):
        merge_directory(files.base, [(files.adapter, 1.0), (tmp_path / "wide", 1.0)], files.out)
    whole = tmp_path / "whole"
    with_whole_tensor(files.adapter, whole, "model.norm.weight", torch.ones(32))
    with pytest.raises(AdapterError, match=r"model.norm.weight as a whole.*merge it alone"):
        merge_directory(files.base, [(whole, 0.5)], files.out)
    assert not files.out.exists()


def test_modules_saved_whole_replace_the_bases(tmp_path):
    files = case(tmp_path, dtype=BF16)
    value = torch.rand(32)
    with_whole_tensor(files.adapter, tmp_path / "whole", "model.norm.weight", value)
    merge_directory(files.base, [(tmp_path / "whole", 1.0)], files.out)
    assert torch.equal(tensors(files.out)["model.norm.weight"], value.bfloat16())


def test_a_base_without_the_heads_prefix_is_found(tmp_path):
    """A base checkpoint often holds the inner model: `h.0…`, not `transformer.h.0…`."""
    files = case(tmp_path, "gpt2", shard="1GB")
    path = files.base / "model.safetensors"
    state = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    run(files)
    merge(files.model)
    assert torch.equal(logits(load(files)), logits(files.model))


def test_a_base_with_another_prefix_is_found_and_an_ambiguous_one_refused(tmp_path):
    files = case(tmp_path, shard="1GB")
    path = files.base / "model.safetensors"
    state = load_file(path)
    inner = {k.replace("model.", "language_model.model.", 1): v for k, v in state.items()}
    save_file(inner, path)
    run(files)
    key = "language_model.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(tensors(files.out)[key], inner[key])
    save_file(inner | {f"other.{k}": v.clone() for k, v in state.items()}, path)
    shutil.rmtree(files.out)
    with pytest.raises(AdapterError, match=r"may be any of language_model\..*, other\."):
        run(files)


def test_shapes_decide_between_two_prefixes_and_a_layers_number_is_never_exchanged(tmp_path):
    files = case(tmp_path, shard="1GB")
    path = files.base / "model.safetensors"
    state = {k: v for k, v in load_file(path).items() if k.startswith("model.layers.")}
    wide = {f"vision.{k}": torch.cat([v, v]) for k, v in state.items()}
    save_file({f"text.{k}": v for k, v in state.items()} | wide, path)
    run(files)
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(tensors(files.out)[f"text.{key}"], state[key])
    assert torch.equal(tensors(files.out)[f"vision.{key}"], wide[f"vision.{key}"])
    last = {k: v for k, v in state.items() if ".layers.0." in k}
    save_file({k.replace("layers.0", "layers.7"): v for k, v in last.items()}, path)
    shutil.rmtree(files.out)
    with pytest.raises(AdapterError, match=r"holds no weight for model.layers.0"):
        run(files)


def test_modules_that_the_checkpoint_lacks_are_named(tmp_path):
    files = case(tmp_path)
    other = trained(models.bert())
    save_adapter(other, tmp_path / "bert")
    with pytest.raises(
        AdapterError, match=r"holds no weight for bert\.encoder.* and 8 more \(13 of 13\)"
    ):
        merge_directory(files.base, [(tmp_path / "bert", 1.0)], files.out)
    assert not files.out.exists()


def test_another_shape_is_refused_and_both_are_said(tmp_path):
    files = case(tmp_path)
    save_adapter(trained(models.llama(intermediate_size=40)), tmp_path / "thin")
    with pytest.raises(
        AdapterError, match=r"_proj is (32×40|40×32) .* (32×48|48×32) in the checkp"
    ):
        merge_directory(files.base, [(tmp_path / "thin", 1.0)], files.out)


def test_square_transposed_weights_follow_fan_in_fan_out(tmp_path):
    files = case(tmp_path, "gpt2", adapter={"target_modules": ["attn.c_proj"]})
    assert read_adapter(files.adapter).parsed.fan_in_fan_out
    run(files)
    merge(files.model)
    assert torch.equal(logits(load(files)), logits(files.model))


def test_square_weights_beside_unannounced_transposed_ones_are_refused(tmp_path):
    files = case(tmp_path, "gpt2")
    adapter = read_adapter(files.adapter)
    config = adapter.config | {"fan_in_fan_out": False}
    write_adapter(AdapterFile(config=config, tensors=adapter.tensors), tmp_path / "silent")
    with pytest.raises(AdapterError, match=r"c_proj is square.*fan_in_fan_out"):
        merge_directory(files.base, [(tmp_path / "silent", 1.0)], files.out)


HEAD = {"target_modules": ["lm_head", "q_proj"]}


def test_a_tied_head_is_refused_with_the_fix(tmp_path):
    files = case(tmp_path, adapter=HEAD, tie_word_embeddings=True)
    with pytest.raises(
        AdapterError, match=r"lm_head.weight is tied to model.embed_tokens.weight.*--untie"
    ):
        run(files)
    assert not files.out.exists()


@pytest.mark.parametrize("shard", ["20KB", "1GB"], ids=["sharded", "single"])
def test_untied_on_request_head_and_embedding_differ_and_the_config_says_so(shard, tmp_path):
    files = case(tmp_path, shard=shard, adapter=HEAD, tie_word_embeddings=True)
    run(files, untie=True)
    loaded = load(files)
    assert not loaded.config.tie_word_embeddings
    torch.testing.assert_close(logits(loaded), logits(files.model), rtol=1e-4, atol=1e-5)
    embedding = files.model.model.embed_tokens.weight
    assert torch.equal(loaded.model.embed_tokens.weight, embedding)


def test_a_head_of_its_own_merges_like_any_linear(tmp_path):
    files = case(tmp_path, adapter=HEAD)
    run(files)
    torch.testing.assert_close(logits(load(files)), logits(files.model), rtol=1e-4, atol=1e-5)


def test_an_adapted_head_with_the_bases_own_beside_it_merges_as_without(tmp_path):
    files = case(tmp_path, adapter=HEAD)
    adapter = read_adapter(files.adapter)
    whole = {"lm_head.weight": files.model.lm_head.weight.detach().clone()}
    both = AdapterFile(config=adapter.config, tensors=adapter.tensors, whole=whole)
    write_adapter(both, tmp_path / "both")
    report = merge_directory(files.base, [(tmp_path / "both", 1.0)], files.out)
    assert report.notes == ()
    torch.testing.assert_close(logits(load(files)), logits(files.model), rtol=1e-4, atol=1e-5)


def test_a_new_tied_head_saved_whole_needs_untie_and_a_new_embedding_is_refused(tmp_path):
    files = case(tmp_path, tie_word_embeddings=True)
    value = torch.rand(64, 32)
    with_whole_tensor(files.adapter, tmp_path / "head", "lm_head.weight", value)
    with pytest.raises(AdapterError, match="lm_head.weight is tied to"):
        merge_directory(files.base, [(tmp_path / "head", 1.0)], files.out)
    merge_directory(files.base, [(tmp_path / "head", 1.0)], files.out, untie=True)
    assert torch.equal(load(files).lm_head.weight, value)
    shutil.rmtree(files.out)
    with_whole_tensor(files.adapter, tmp_path / "emb", "model.embed_tokens.weight", value)
    with pytest.raises(AdapterError, match="which may be tied to the output head"):
        merge_directory(files.base, [(tmp_path / "emb", 1.0)], files.out, untie=True)


def test_quantised_checkpoints_are_refused(tmp_path):
    files = case(tmp_path, shard="1GB")
    path = files.base / "model.safetensors"
    state = load_file(path)
    key = "model.layers.0.mlp.up_proj.weight"
    save_file(state | {key: state[key].to(torch.uint8)}, path)
    with pytest.raises(AdapterError, match=r"up_proj is quantised in the checkpoint \(U8"):
        run(files)
    packed = {k.replace(".weight", ".qweight") if "proj" in k else k: v for k, v in state.items()}
    save_file(packed, path)
    with pytest.raises(AdapterError, match="is quantised in the checkpoint"):
        run(files)
