"""A merged model directory: the same model as merging in memory, whatever the disk does to us."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bridge.peft import AdapterError, LoRA, merge, save_adapter
from bridge.peft.formats.peft import AdapterFile, read_adapter, write_adapter
from bridge.peft.merging import rounding
from bridge.peft.merging.directory import merge as merge_module
from bridge.peft.merging.directory import merge_directory, stream, worker
from bridge.peft.merging.directory.checkpoint import Entry, header_bytes, read_checkpoint
from tests.helpers import models

transformers.utils.logging.disable_progress_bar()
BF16 = torch.bfloat16


def trained(model, size=0.1, seed=2, **recipe):
    model = LoRA(**({"dim": 4, "seed": seed} | recipe))(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "lora_b"):
                values = torch.randn(layer.lora_b.weight.shape, generator=generator) * size
                layer.lora_b.weight.copy_(values)
    return model.eval()


def case(path, kind="llama", dtype=torch.float32, shard="20KB", *, adapter=None, **config):
    """A base directory, an adapter directory and the adapted model."""
    torch.manual_seed(0)
    base = getattr(models, kind)(**config).to(dtype).eval()
    base.save_pretrained(path / "base", max_shard_size=shard)
    model = trained(base, **(adapter or {}))
    save_adapter(model, path / "adapter")
    return SimpleNamespace(
        base=path / "base", adapter=path / "adapter", out=path / "out", model=model
    )


def run(files, *, weight=1.0, **options):
    return merge_directory(files.base, [(files.adapter, weight)], files.out, **options)


def tensors(directory):
    found = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def logits(model):
    with torch.no_grad():
        return model(**models.inputs(model)).logits


def load(files, **options):
    model = type(files.model).from_pretrained(files.out, **options)
    return model.eval()


@pytest.mark.parametrize("shard", ["20KB", "1GB"], ids=["sharded", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "t5", "bert", "qwen2"])
def test_directory_equals_a_merge_in_memory_bit_for_bit(kind, dtype, shard, tmp_path):
    files = case(tmp_path, kind, dtype, shard)
    report = run(files)
    in_memory = merge(files.model)
    loaded, wanted = load(files).state_dict(), files.model.state_dict()
    assert loaded.keys() == wanted.keys()
    for name in wanted:
        # transformers loads some of T5's float16 weights as float32
        assert torch.equal(loaded[name].to(wanted[name].dtype), wanted[name]), name
    rows = {row.fqn: row for row in report.rows}
    assert rows.keys() == {row.fqn for row in in_memory.rows}
    for row in in_memory.rows:
        for field, value in dataclasses.asdict(row).items():
            if field != "fqn":
                assert getattr(rows[row.fqn], field) == pytest.approx(value, rel=1e-3), field
    assert contents(files.out).keys() == contents(files.base).keys()


def test_merged_directory_generates_the_same_tokens_as_the_unmerged_model(tmp_path):
    files = case(tmp_path)
    run(files)
    merged = transformers.AutoModelForCausalLM.from_pretrained(files.out).eval()
    ids = models.inputs(files.model, batch=4)["input_ids"]
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    wanted = files.model.generate(ids, **settings)
    assert torch.equal(merged.generate(ids, **settings), wanted)
    base = transformers.AutoModelForCausalLM.from_pretrained(files.base).eval()
    assert not torch.equal(base.generate(ids, **settings), wanted)


def test_several_adapters_add_up_with_their_weights(tmp_path):
    files = case(tmp_path)
    other = trained(models.llama(), seed=5, dim=2, target_modules=["q_proj", "gate_proj"])
    save_adapter(other, tmp_path / "other")
    merge_directory(files.base, [(files.adapter, 0.5), (tmp_path / "other", -2.0)], files.out)
    base, merged = tensors(files.base), tensors(files.out)
    first, second = read_adapter(files.adapter), read_adapter(tmp_path / "other")
    for name, weight in base.items():
        wanted, fqn = weight.double(), name.removesuffix(".weight")
        for adapter, share in ((first, 0.5), (second, -2.0)):
            if fqn in adapter.tensors:
                a, b = adapter.tensors[fqn]
                wanted = wanted + share * adapter.scale(fqn) * (b.double() @ a.double())
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-5, atol=1e-6)


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


def with_whole_tensor(source, target, name, value):
    adapter = read_adapter(source)
    config = adapter.config | {"modules_to_save": [name.split(".")[-2]]}
    write_adapter(AdapterFile(config=config, tensors=adapter.tensors, whole={name: value}), target)


def test_modules_saved_whole_replace_the_bases(tmp_path):
    files = case(tmp_path, dtype=BF16)
    value = torch.rand(32)
    with_whole_tensor(files.adapter, tmp_path / "whole", "model.norm.weight", value)
    merge_directory(files.base, [(tmp_path / "whole", 1.0)], files.out)
    assert torch.equal(tensors(files.out)["model.norm.weight"], value.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.float64], ids=str)
def test_dtype_converts_every_floating_tensor_and_is_said_in_the_config(dtype, tmp_path):
    files = case(tmp_path, dtype=BF16)
    run(files, dtype=dtype)
    merged = tensors(files.out)
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    base = tensors(files.base)
    name = "model.norm.weight"
    assert torch.equal(merged[name], base[name].to(dtype))
    assert load(files).dtype == dtype
    index = json.loads((files.out / "model.safetensors.index.json").read_text())
    total = sum(tensor.numel() * dtype.itemsize for tensor in merged.values())
    assert index["metadata"]["total_size"] == total
    adapter = read_adapter(files.adapter)
    fqn = "model.layers.1.mlp.down_proj"
    a, b = adapter.tensors[fqn]
    exact = base[f"{fqn}.weight"].double() + adapter.scale(fqn) * (b.double() @ a.double())
    half_ulp = max(torch.finfo(dtype).eps / 2, 1e-15)
    torch.testing.assert_close(
        merged[f"{fqn}.weight"].double(), exact, rtol=half_ulp * 1.01, atol=1e-6
    )


def test_integers_and_unknown_dtypes_are_copied_as_they_are(tmp_path):
    files = case(tmp_path, shard="1GB")
    path = files.base / "model.safetensors"
    state = load_file(path)
    state["model.counts"] = torch.arange(7)
    state["model.cube"] = torch.rand(3, 4, 5)
    state["model.nothing"] = torch.empty(0, 3)
    state["model.scalar"] = torch.tensor(2.5)
    save_file(state, path, metadata={"format": "pt", "more": "text"})
    run(files, dtype=BF16)
    merged = tensors(files.out)
    assert torch.equal(merged["model.counts"], torch.arange(7))
    assert torch.equal(merged["model.cube"], state["model.cube"].bfloat16())
    assert merged["model.nothing"].shape == (0, 3)
    assert merged["model.scalar"].item() == 2.5
    with safe_open(files.out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "more": "text"}


def test_other_files_are_copied_and_other_weights_are_not(tmp_path):
    files = case(tmp_path)
    (files.base / "tokenizer.json").write_text("{}")
    (files.base / "LICENSE").write_text("free")
    (files.base / "additional_chat_templates").mkdir()
    (files.base / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    for name in ("pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json", ".hidden"):
        (files.base / name).write_text("old")
    (files.base / "onnx").mkdir()
    run(files)
    names = {path.name for path in files.out.iterdir()}
    assert {"tokenizer.json", "LICENSE", "generation_config.json"} <= names
    assert (files.out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ x }}"
    assert not names & {"pytorch_model.bin", "model.gguf", ".hidden", "onnx", ".merge.json"}
    assert "pytorch_model.bin.index.json" not in names


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


def test_modules_that_the_checkpoint_lacks_are_named(tmp_path):
    files = case(tmp_path)
    other = trained(models.bert())
    save_adapter(other, tmp_path / "bert")
    with pytest.raises(
        AdapterError, match=r"holds no weight for bert\.encoder.* and 10 more \(13 of 13\)"
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


def test_a_tied_head_is_refused_with_the_mend(tmp_path):
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


def test_an_adapted_head_with_the_bases_own_beside_it_is_refused(tmp_path):
    files = case(tmp_path, adapter=HEAD)
    adapter = read_adapter(files.adapter)
    whole = {"lm_head.weight": files.model.lm_head.weight.detach().clone()}
    both = AdapterFile(config=adapter.config, tensors=adapter.tensors, whole=whole)
    write_adapter(both, tmp_path / "both")
    with pytest.raises(AdapterError, match="as a whole and an update of it.*save_embedding_layers"):
        merge_directory(files.base, [(tmp_path / "both", 1.0)], files.out)


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


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda f: shutil.rmtree(f.base), "base does not exist; pass the directory of a base"),
        (lambda f: (shutil.rmtree(f.base), f.base.write_text("")), "base is a file"),
        (lambda f: (f.base / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f.base / "config.json").write_text("{"), "config.json is no valid JSON"),
        (lambda f: (f.base / "config.json").write_text("[]"), "holds a list, not an object"),
        (lambda f: (f.base / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (
            lambda f: (f.base / "model.safetensors").rename(f.base / "pytorch_model.bin"),
            r"as a pickle \(pytorch_model.bin\).*save it again with save_pretrained",
        ),
        (lambda f: f.out.mkdir() or (f.out / "x").write_text(""), "out exists; pass a directory"),
        (lambda f: f.out.write_text(""), "out exists; pass a directory"),
        (lambda f: shutil.rmtree(f.adapter), "adapter is not an adapter directory"),
        (lambda f: f.base.chmod(0o755) or cut(f.base / "model.safetensors", -1), "is damaged"),
        (lambda f: cut(f.base / "model.safetensors", 5), "is damaged"),
        (lambda f: cut(f.base / "model.safetensors", 100), "is damaged"),
        (
            lambda f: (
                f.out.with_name("out.part").mkdir()
                or (f.out.with_name("out.part") / "mine").write_text("keep")
            ),
            "out.part is in the way",
        ),
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_is_written(edit, words, tmp_path):
    files = case(tmp_path, shard="1GB")
    edit(files)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(AdapterError, match=words):
        run(files)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def cut(path, size):
    os.truncate(path, path.stat().st_size + size if size < 0 else size)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"a": "../x.safetensors"}}, "no safetensors file beside it"),
        ({"weight_map": {"a": "x.bin"}}, "no safetensors file beside it"),
        ({"weight_map": {"a": 3}}, "no safetensors file beside it"),
        ({"weight_map": {"a": "x.safetensors"}}, "x.safetensors is missing"),
        ({"weight_map": {"a": "x.safetensors"}, "metadata": "x"}, "metadata that is no object"),
    ],
)
def test_damaged_indexes_are_refused(index, words, tmp_path):
    files = case(tmp_path)
    (files.base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterError, match=words):
        run(files)


def test_an_index_that_contradicts_the_files_is_refused(tmp_path):
    files = case(tmp_path)
    path = files.base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, *_, last = sorted(index["weight_map"])
    index["weight_map"][first] = index["weight_map"][last]
    path.write_text(json.dumps(index))
    with pytest.raises(AdapterError, match=f"places {first} in .*, which does not hold it"):
        run(files)
    shards = sorted(files.base.glob("*.safetensors"))
    shutil.copy(shards[0], shards[1])
    with pytest.raises(AdapterError, match="twice, in"):
        run(files)


_A = b'"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'
HEADERS = {
    "not JSON": b"{",
    "a list": b"[]",
    "an entry without offsets": b'{"a": {"dtype": "F32", "shape": [1]}}',
    "a negative shape": b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    "a gap": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "wrong size": b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
    "bytes left": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "metadata that is no object": b'{"__metadata__":3,' + _A,
    "metadata that is no text": b'{"__metadata__":{"a":1},' + _A,
    "a key twice": b'{"a":3,' + _A,
    "no file at all": None,
    "10 GB of header": (10**10).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_headers_are_refused(name, tmp_path):
    files = case(tmp_path, shard="1GB")
    path, header = files.base / "model.safetensors", HEADERS[name]
    if header is None:
        header = b""
    elif len(header) < 90 and not header.startswith(bytes(1)) and "GB" not in name:
        header = len(header).to_bytes(8, "little") + header + bytes(8)
    path.write_bytes(header)
    with pytest.raises(AdapterError, match="is damaged"):
        run(files)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_the_base_leave_no_output(value, tmp_path):
    files = case(tmp_path, shard="1GB")
    path = files.base / "model.safetensors"
    state = load_file(path)
    state["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(state, path)
    with pytest.raises(AdapterError, match=r"up_proj.weight holds NaN or inf in the base"):
        run(files)
    assert not files.out.exists()
    assert not files.out.with_name("out.part").exists()


def test_sums_and_casts_that_overflow_leave_no_output(tmp_path):
    files = case(tmp_path, shard="1GB")
    path = files.base / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"][3] = 1e6
    save_file(state, path)
    with pytest.raises(AdapterError, match=r"model.norm.weight holds values too large for"):
        run(files, dtype=torch.float16)
    with pytest.raises(AdapterError, match=r"the merged .*proj.weight overflows torch.float16"):
        run(files, dtype=torch.float16, weight=1e7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_wrong_options_are_refused(tmp_path):
    files = case(tmp_path)
    with pytest.raises(AdapterError, match="float32 or torch.float64, got torch.bfloat16"):
        run(files, compute_dtype=BF16)
    with pytest.raises(AdapterError, match="written in float64, float32.*got torch.int8"):
        run(files, dtype=torch.int8)
    with pytest.raises(AdapterError, match="no adapter to merge"):
        merge_directory(files.base, [], files.out)


def test_float64_computation_rounds_once_to_the_base_dtype(tmp_path):
    files = case(tmp_path, dtype=BF16)
    run(files, compute_dtype=torch.float64)
    merge(files.model, dtype=torch.float64)
    wanted = files.model.state_dict()
    for name, tensor in tensors(files.out).items():
        assert torch.equal(tensor, wanted[name]), name


def test_blocks_and_sampling_change_no_weight(tmp_path, monkeypatch):
    files = case(tmp_path, dtype=BF16)
    run(files)
    whole = tensors(files.out)
    shutil.rmtree(files.out)
    monkeypatch.setattr(worker, "_MEASURED_IN_PART", 64)
    monkeypatch.setattr(stream, "_COPY_BYTES", 100)
    monkeypatch.setitem(rounding._BLOCK, "cpu", 200)
    run(files)
    for name, tensor in tensors(files.out).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0.01, atol=1e-4)


def test_an_adapter_of_another_base_is_noted(tmp_path):
    files = case(tmp_path)
    assert run(files).notes == ()
    torch.manual_seed(1)
    models.llama().save_pretrained(tmp_path / "other")
    report = merge_directory(tmp_path / "other", [(files.adapter, 1.0)], tmp_path / "out2")
    assert len(report.notes) == 1
    assert "warning: the base model is not the one that the adapter was made on" in str(report)
    assert "14 modules differ" in report.to_dict()["notes"][0]


def test_several_threads_write_the_same_and_leave_the_number_of_threads(tmp_path, monkeypatch):
    files = case(tmp_path, dtype=BF16)
    monkeypatch.setitem(rounding._BLOCK, "cpu", 200)
    before, reports = torch.get_num_threads(), []
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            reports.append((run(files), contents(files.out)))
            assert torch.get_num_threads() == threads
            shutil.rmtree(files.out)
    finally:
        torch.set_num_threads(before)
    assert reports[0] == reports[1]


def test_without_the_kernels_copy_the_bytes_are_the_same(tmp_path, monkeypatch):
    files = case(tmp_path)
    run(files)
    wanted = contents(files.out)
    for replacement in (None, OSError(errno.EXDEV, "other disk")):
        shutil.rmtree(files.out)
        if replacement is None:
            monkeypatch.delattr(os, "copy_file_range")
        else:

            def fail(*args, error=replacement):
                raise error

            monkeypatch.setattr(os, "copy_file_range", fail, raising=False)
        run(files)
        assert contents(files.out) == wanted


def fail_after(count, error, monkeypatch):
    """Let writing files fail after so many of them."""
    calls, real = [], stream.write_shard

    def write(*args, **options):
        calls.append(args[0].name)
        if len(calls) > count:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(merge_module, "write_shard", write)
    return calls


def test_an_interrupted_merge_goes_on_where_it_stopped(tmp_path, monkeypatch):
    files = case(tmp_path)
    whole = run(files)
    wanted = contents(files.out)
    shutil.rmtree(files.out)
    calls = fail_after(2, KeyboardInterrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(files)
    assert not files.out.exists()
    monkeypatch.undo()
    again, seen = fail_after(99, None, monkeypatch), []
    report = run(files, progress=lambda done, total: seen.append(done / total))
    assert not {*calls[:2]} & {*again}
    assert contents(files.out) == wanted
    assert report == whole
    assert seen == sorted(seen)
    assert (seen[0] > 0.3, seen[-1]) == (True, 1)
    assert not files.out.with_name("out.part").exists()


KILLED = """
import os, signal, sys
from bridge.peft.merging.directory import merge, merge_directory

real, written = merge.write_shard, []

def write(path, *args, **options):
    if len(written) == 2:
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
    return real(path, *args, **options)

merge.write_shard = write
merge_directory(sys.argv[1], [(sys.argv[2], 1.0)], sys.argv[3])
"""


def test_a_killed_merge_goes_on_too(tmp_path, monkeypatch):
    files = case(tmp_path)
    arguments = [sys.executable, "-c", KILLED, files.base, files.adapter, files.out]
    assert subprocess.run(arguments, check=False).returncode == -9
    assert not files.out.exists()
    calls = fail_after(99, None, monkeypatch)
    run(files)
    assert len(calls) == len(list(files.base.glob("*.safetensors"))) - 2
    merge(files.model)
    assert torch.equal(logits(load(files)), logits(files.model))


@pytest.mark.parametrize("change", ["weight", "dtype", "adapter", "base", "file", "journal"])
def test_another_job_starts_anew(change, tmp_path, monkeypatch):
    files = case(tmp_path)
    fail_after(2, KeyboardInterrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(files)
    monkeypatch.undo()
    part = files.out.with_name("out.part")
    options = {"weight": {"weight": 2.0}, "dtype": {"dtype": BF16}}.get(change, {})
    if change == "adapter":
        save_adapter(trained(models.llama(), seed=9), files.adapter)
    elif change == "base":
        for path in files.base.glob("*.safetensors"):
            state = {name: tensor + 1 for name, tensor in load_file(path).items()}
            save_file(state, path, metadata={"format": "pt"})
    elif change == "file":
        cut(next(part.glob("*.safetensors")), 10)
    elif change == "journal":
        (part / ".merge.json").write_text("{")
    run(files, **options)
    merged = contents(files.out)
    shutil.rmtree(files.out)
    run(files, **options)
    assert contents(files.out) == merged


def test_a_full_disk_leaves_no_output_and_the_finished_files(tmp_path, monkeypatch):
    files = case(tmp_path)
    fail_after(1, OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
    with pytest.raises(AdapterError, match=r"no space left on the disk.*goes on from them"):
        run(files)
    assert not files.out.exists()
    monkeypatch.undo()
    run(files)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    files = case(tmp_path)
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(AdapterError, match=r"needs 0.00 GB and the disk of .* has 0.00 GB free"):
        run(files)
    assert not list(tmp_path.glob("out*"))


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path):
    files = case(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match=r"cannot write to .*file; |cannot write to"):
        merge_directory(files.base, [(files.adapter, 1.0)], tmp_path / "file" / "out")


def test_an_empty_output_directory_and_missing_parents_are_fine(tmp_path):
    files = case(tmp_path)
    files.out.mkdir()
    run(files)
    nested = tmp_path / "a" / "b"
    merge_directory(files.base, [(files.adapter, 1.0)], nested)
    assert contents(nested) == contents(files.out)


def test_links_to_weights_are_followed(tmp_path):
    """As the Hub's cache lays them out."""
    files = case(tmp_path)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(files.base.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    run(files)
    assert not any(path.is_symlink() for path in files.out.iterdir())
    merge(files.model)
    assert torch.equal(logits(load(files)), logits(files.model))


def test_headers_are_written_as_safetensors_reads_them(tmp_path):
    entries = [Entry("b", "F32", (2,), 0, 8), Entry("ä", "I64", (), 8, 16)]
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_bytes(entries, {}) + bytes(16))
    assert load_file(path).keys() == {"b", "ä"}
    assert len(header_bytes(entries, {})) % 8 == 0


def test_checkpoints_are_read_without_their_tensors(tmp_path):
    files = case(tmp_path)
    checkpoint = read_checkpoint(files.base)
    assert checkpoint.entries().keys() == tensors(files.base).keys()


MEASURE = """
import sys
from pathlib import Path
import torch
from bridge.peft.merging.directory import merge_directory

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.ones(2) @ torch.ones(2)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
merge_directory(sys.argv[1], [(sys.argv[2], 1.0)], sys.argv[3])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_below_one_and_a_half_times_the_largest_file(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    weight = torch.randn(3000, 5000).bfloat16()  # 30 MB a file
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    places = {f"{name}.weight": f"model-{i}.safetensors" for i, name in enumerate(names)}
    for key, name in places.items():
        save_file({key: weight}, base / name, metadata={"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (base / "config.json").write_text("{}")
    pairs = {name: (torch.randn(8, 5000), torch.randn(3000, 8)) for name in names}
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up_proj"]}
    write_adapter(AdapterFile(config=config, tensors=pairs), tmp_path / "adapter")
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 1.5 * weight.nbytes
    assert len(tensors(tmp_path / "out")) == 2


def test_paths_that_the_system_refuses_are_told(tmp_path):
    files, long = case(tmp_path), "x" * 300
    with pytest.raises(AdapterError, match="cannot read .*x: File name too long"):
        merge_directory(tmp_path / long, [(files.adapter, 1.0)], files.out)
    with pytest.raises(AdapterError, match="cannot read .*File name too long"):
        merge_directory(files.base, [(tmp_path / long, 1.0)], files.out)
    with pytest.raises(AdapterError, match="cannot write to .*File name too long"):
        merge_directory(files.base, [(files.adapter, 1.0)], tmp_path / long)
    assert not files.out.exists()
