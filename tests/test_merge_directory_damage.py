"""Bad input and bad disks: one clear error, and no output."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bridge.peft import AdapterError
from bridge.peft.merging.directory import merge_directory
from tests.helpers.directories import case, cut, run

transformers.utils.logging.disable_progress_bar()
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda f: shutil.rmtree(f.base), "base does not exist; pass the directory of a base"),
        (lambda f: (shutil.rmtree(f.base), f.base.write_text("")), "base is a file"),
        (lambda f: (f.base / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f.base / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f.base / "config.json").write_text("[]"), "must hold an object, got a list"),
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


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"a": "../x.safetensors"}}, "not a safetensors file beside it"),
        ({"weight_map": {"a": "x.bin"}}, "not a safetensors file beside it"),
        ({"weight_map": {"a": 3}}, "not a safetensors file beside it"),
        ({"weight_map": {"a": "x.safetensors"}}, "x.safetensors is missing"),
        ({"weight_map": {"a": "x.safetensors"}, "metadata": "x"}, "metadata is not an object"),
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
    "metadata is not an object": b'{"__metadata__":3,' + _A,
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
    with pytest.raises(AdapterError, match="written in float32, bfloat16.*got torch.int8"):
        run(files, dtype=torch.int8)
    with pytest.raises(AdapterError, match="no adapter to merge"):
        merge_directory(files.base, [], files.out)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    files = case(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(AdapterError, match=r"needs 0.00 GB and the disk of .* has 0.00 GB free"):
        run(files)
    assert not list(tmp_path.glob("out*"))


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path):
    files = case(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match=r"cannot write to .*file; |cannot write to"):
        merge_directory(files.base, [(files.adapter, 1.0)], tmp_path / "file" / "out")


def test_paths_that_the_system_refuses_are_told(tmp_path):
    files, long = case(tmp_path), "x" * 300
    with pytest.raises(AdapterError, match="cannot read .*File name too long"):
        merge_directory(tmp_path / long, [(files.adapter, 1.0)], files.out)
    with pytest.raises(AdapterError, match="cannot read .*File name too long"):
        merge_directory(files.base, [(tmp_path / long, 1.0)], files.out)
    with pytest.raises(AdapterError, match="cannot write to .*File name too long"):
        merge_directory(files.base, [(files.adapter, 1.0)], tmp_path / long)
    assert not files.out.exists()
