"""A merged model directory is the model that merging in memory makes."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bridge.peft import merge, save_adapter
from bridge.peft.formats.peft import AdapterFile, read_adapter, write_adapter
from bridge.peft.merging.directory import merge_directory
from bridge.peft.merging.in_memory import merge_weight
from tests.helpers import models
from tests.helpers.directories import case, contents, load, logits, run, tensors, trained

transformers.utils.logging.disable_progress_bar()
BF16 = torch.bfloat16


def same_row(found, wanted):
    """Sums of float32 are taken over blocks of another size."""
    for field, value in dataclasses.asdict(wanted).items():
        if field != "fqn":
            assert getattr(found, field) == pytest.approx(value, rel=1e-4), field


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
        same_row(rows[row.fqn], row)
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


def test_float64_computation_rounds_once_to_the_base_dtype(tmp_path):
    files = case(tmp_path, dtype=BF16)
    run(files, compute_dtype=torch.float64)
    merge(files.model, compute_dtype=torch.float64)
    wanted = files.model.state_dict()
    for name, tensor in tensors(files.out).items():
        assert torch.equal(tensor, wanted[name]), name


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


def test_an_adapter_of_another_base_is_noted(tmp_path):
    files = case(tmp_path)
    assert run(files).notes == ()
    torch.manual_seed(1)
    models.llama().save_pretrained(tmp_path / "other")
    report = merge_directory(tmp_path / "other", [(files.adapter, 1.0)], tmp_path / "out2")
    assert len(report.notes) == 1
    assert "warning: the base model is not the one that the adapter was made on" in str(report)
    assert "14 modules differ" in report.to_dict()["notes"][0]


def test_several_threads_write_the_same_and_leave_the_number_of_threads(tmp_path):
    files = case(tmp_path, intermediate_size=9000)  # more than one piece of each matrix
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


def test_an_empty_output_directory_and_missing_parents_are_fine(tmp_path):
    files = case(tmp_path)
    files.out.mkdir()
    run(files)
    nested = tmp_path / "a" / "b"
    merge_directory(files.base, [(files.adapter, 1.0)], nested)
    assert contents(nested) == contents(files.out)


MEASURE = """
import sys
from pathlib import Path
import torch
from bridge.peft.merging.directory import merge_directory
from bridge.peft.merging.in_memory import merge_weight

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
def test_memory_stays_below_the_largest_file_and_pieces_change_nothing(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    weight = torch.randn(3000, 5000).bfloat16()  # 30 MB a file, in 4 pieces
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    places = {f"{name}.weight": f"model-{i}.safetensors" for i, name in enumerate(names)}
    for key, name in places.items():
        save_file({key: weight}, base / name, metadata={"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (base / "config.json").write_text("{}")
    pairs = {name: (torch.randn(8, 5000), torch.randn(3000, 8) * 1e-3) for name in names}
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up_proj"]}
    write_adapter(AdapterFile(config=config, tensors=pairs), tmp_path / "adapter")
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 1.2 * weight.nbytes
    report = merge_directory(base, [(tmp_path / "adapter", 1.0)], tmp_path / "again")
    for key, merged in tensors(tmp_path / "out").items():
        wanted, row = merge_weight(weight, *pairs[key.removesuffix(".weight")], 1.0)
        assert torch.equal(merged, wanted)
        same_row(next(r for r in report.rows if f"{r.fqn}.weight" == key), row)


def test_a_config_may_hold_infinity(tmp_path):
    files = case(tmp_path)
    config = json.loads((files.base / "config.json").read_text()) | {"limit": [0.0, float("inf")]}
    (files.base / "config.json").write_text(json.dumps(config))
    run(files)
    assert json.loads((files.out / "config.json").read_text()) == config
