"""Hostile and damaged adapters, one by one: refused in clear words, the model untouched."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil

import pytest
import safetensors.torch as st
import torch
from torch import nn

from bridge.peft import (
    AdapterError,
    LoRA,
    LoRALinear,
    adapter_state_dict,
    load_adapter,
    merge,
    patch_linear_module,
    save_adapter,
)
from bridge.peft.errors import AlreadyAdaptedError
from bridge.peft.formats.convert.adapters import convert_adapter
from bridge.peft.formats.files.safetensors_file import serialize
from bridge.peft.formats.peft import read_adapter
from tests.helpers import models

CONFIG, TENSORS, SIDE = "adapter_config.json", "adapter_model.safetensors", "bridge_adapter.json"
A = "base_model.model.first.lora_A.weight"


def tiny_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(4, 3), "second": nn.Linear(3, 2)})


@pytest.fixture
def directory(tmp_path):
    model = LoRA(dim=2)(tiny_model())
    for tensor in adapter_state_dict(model).values():
        tensor.normal_()
    return save_adapter(model, tmp_path / "adapter")


def refused(directory, words):
    """The adapter is refused with an `AdapterError` of one line, and the model as it was."""
    model = tiny_model()
    with pytest.raises(AdapterError, match=words) as info:
        load_adapter(model, directory)
    assert str(info.value).isprintable()
    for ours, fresh in zip(model.modules(), tiny_model().modules(), strict=True):
        assert type(ours) is type(fresh)
    for ours, fresh in zip(model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(ours, fresh) and ours.requires_grad


def set_config(directory, name=CONFIG, **fields):
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def set_tensors(directory, **changes):
    tensors = st.load_file(directory / TENSORS)
    for key, value in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if value is not None:
            tensors[key.replace("__", ".")] = value
    (directory / TENSORS).write_bytes(st.save(tensors))


#: What a config may ask for that cannot be given, and nothing may drop in silence.
NOT_HONOURED = {
    "use_dora": True,
    "lora_bias": True,
    "use_qalora": True,
    "target_parameters": ["first.weight"],
    "trainable_token_indices": [1, 2],
    "alora_invocation_tokens": [5],
    "layer_replication": [[0, 4], [2, 5]],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"corda_method": "ipm"},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"x": 1},
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 8},
    "lora_ga_config": {"direction": "ArBr"},
    "ensure_weight_tying": True,
    "a_field_of_the_future": 7,
    "init_lora_weights": "pissa",
    "peft_type": "VERA",
}


@pytest.mark.parametrize("field", NOT_HONOURED)
def test_what_cannot_be_honoured_is_refused_by_name(directory, field):
    set_config(directory, **{field: NOT_HONOURED[field]})
    refused(directory, f"adapter_config.json: {field}")


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "corda", "loftq", "lora_ga", 3])
def test_initialisations_that_change_the_base_are_refused(directory, init):
    set_config(directory, init_lora_weights=init)
    refused(directory, "changes the base weights")


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_do_not_are_read(directory, init):
    set_config(directory, init_lora_weights=init)
    load_adapter(tiny_model(), directory)


WRONG_TYPES = {
    "r": ["8", 0, -1, 2.5, True, 10**9, []],
    "lora_alpha": ["16", True, [], 10**400, 1e300],
    "lora_dropout": [1.0, -0.1, "0", True],
    "use_rslora": ["yes", 1],
    "target_modules": [3, [], [3], [""], "", "(", ["x" * 5000]],
    "exclude_modules": [3, [None], "("],
    "rank_pattern": [[], {"first": 0}, {"first": "4"}, {"(": 4}, {"first": 10**9}],
    "alpha_pattern": [[], {"first": "4"}, {"(": 4}],
    "layers_to_transform": ["all", [1.5], [-1], -1, [10**9]],
    "layers_pattern": [3, ["("], ["a|b"]],
    "modules_to_save": [3, [".*"], [3]],
    "bias": ["some", True],
    "fan_in_fan_out": ["no"],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in WRONG_TYPES.items() for v in vs])
def test_values_of_wrong_types_are_refused_by_name(directory, field, value):
    set_config(directory, **{field: value})
    refused(directory, f"adapter_config.json: {field}")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "{}", "NaN", "[" * 100_000])
def test_configs_that_are_no_object_or_no_json_are_refused(directory, text):
    (directory / CONFIG).write_text(text)
    refused(directory, "adapter_config.json")


def test_duplicate_fields_are_refused(directory):
    text = (directory / CONFIG).read_text()
    (directory / CONFIG).write_text(text.rstrip()[:-1] + ', "r": 2}')
    refused(directory, "duplicate key 'r'")


def test_layers_with_a_regex_are_refused(directory):
    set_config(directory, target_modules=".*first", layers_to_transform=[0])
    refused(directory, "layers_to_transform needs target_modules as a list")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dropout_position": "middle"}, "dropout_position must be 'pre' or 'post'"),
        ({"lora_A_init_method": 3}, "lora_A_init_method must be"),
        ({"exceptions": []}, "exceptions must be an object"),
        ({"exceptions": {"first": 3}}, r"exceptions\['first'\] must be an object"),
        (
            {"exceptions": {"first": {"dropout": 2}}},
            r"exceptions\['first'\].dropout must be a number",
        ),
        ({"base": 3}, "base must hold"),
        ({"base": {"first": {"shape": 3}}}, "base must hold"),
    ],
)
def test_side_files_of_wrong_types_are_refused(directory, fields, words):
    set_config(directory, SIDE, **fields)
    refused(directory, f"bridge_adapter.json: {words}")


def test_absurd_patterns_are_refused_quickly(directory):
    set_config(directory, rank_pattern={f"x{i}": 4 for i in range(50_000)})
    refused(directory, "rank_pattern must be an object of at most")
    set_config(directory, rank_pattern={f"(x{i})*": 4 for i in range(19_000)})
    refused(directory, "takes too long")


def test_a_pickle_is_refused_unread(directory):
    (directory / TENSORS).unlink()
    (directory / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refused(directory, "pickle.*safetensors")


def test_missing_files_are_named(directory, tmp_path):
    refused(tmp_path / "nowhere", "no adapter directory")
    (directory / TENSORS).unlink()
    refused(directory, f"holds no {TENSORS}")
    (directory / CONFIG).unlink()
    refused(directory, f"holds no {CONFIG}")


@pytest.mark.parametrize("name", [CONFIG, TENSORS, SIDE])
def test_links_out_of_the_directory_are_refused(directory, tmp_path, name):
    shutil.move(directory / name, tmp_path / name)
    (directory / name).symlink_to(f"../{name}")
    refused(directory, "link out of its directory")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_what_is_no_regular_file_is_refused_without_waiting(directory, name, make):
    (directory / name).unlink()
    make(directory / name)
    refused(directory, "not a regular file")


def test_the_cache_of_the_hub_is_read_through_its_links(directory, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG, TENSORS):
        shutil.copy(directory / name, blobs / f"hash-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    load_adapter(tiny_model(), snapshot)


def test_links_within_the_directory_are_read(directory):
    shutil.move(directory / TENSORS, directory / "real")
    (directory / TENSORS).symlink_to("real")
    load_adapter(tiny_model(), directory)


def _header(directory, change):
    content = (directory / TENSORS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + size].decode(), content[8 + size :]
    new = change(text).encode()
    (directory / TENSORS).write_bytes(len(new).to_bytes(8, "little") + new + data)


def _entry(text, **fields):
    header = json.loads(text)
    header[A].update(fields)
    return json.dumps(header)


HEADERS = {
    "no json": lambda text: text.rstrip()[:-5],
    "a list": lambda text: "[]",
    "a key twice": lambda text: text.rstrip()[:-1] + f',"{A}":' + "{}}",
    "no shape": lambda text: text.replace('"shape"', '"shapes"', 1),
    "an integer dtype": lambda text: _entry(text, dtype="I32"),
    "a strange dtype": lambda text: _entry(text, dtype="F7"),
    "a dtype with a control character": lambda text: _entry(text, dtype="F3\x7f"),
    "a wider dtype": lambda text: _entry(text, dtype="F64"),
    "a larger shape": lambda text: _entry(text, shape=[200, 400]),
    "a negative shape": lambda text: _entry(text, shape=[-2, -4]),
    "a huge empty shape": lambda text: _entry(text, shape=[0, 2**62], data_offsets=[0, 0]),
    "offsets beyond the file": lambda text: _entry(text, data_offsets=[10**9, 10**9 + 32]),
    "offsets that overlap": lambda text: _entry(text, data_offsets=[4, 36]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_headers_are_refused(directory, name):
    _header(directory, HEADERS[name])
    refused(directory, "adapter_model.safetensors")


def test_a_header_that_claims_ten_gigabytes_is_refused_unread(directory):
    content = (directory / TENSORS).read_bytes()
    (directory / TENSORS).write_bytes((10**10).to_bytes(8, "little") + content[8:])
    refused(directory, "its header claims 10,000,000,000 bytes")


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1, -100])
def test_truncated_files_are_refused(directory, size):
    content = (directory / TENSORS).read_bytes()
    (directory / TENSORS).write_bytes(content[:size])
    refused(directory, "is damaged")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(directory, value):
    tensor = torch.ones(2, 4)
    tensor[1, 2] = value
    set_tensors(directory, base_model__model__first__lora_A__weight=tensor)
    refused(directory, "lora_A.weight holds NaN or inf")


TENSOR_CHANGES = {
    "A of another width": ("first__lora_A", torch.ones(2, 5), "first is 3×4"),
    "A of another rank": ("first__lora_A", torch.ones(3, 4), "config gives it rank 2"),
    "A of three dimensions": ("first__lora_A", torch.ones(2, 4, 1), "config gives it rank 2"),
    "B of another height": ("second__lora_B", torch.ones(5, 2), "second is 2×3"),
    "no B": ("second__lora_B", None, "only the A of second"),
    "a magnitude": ("second__lora_magnitude_vector", torch.ones(2), "neither an A or B"),
    "a strange module": ("third__lora_A", torch.ones(2, 2), "only the A of third"),
    "an undeclared bias": ("second", torch.ones(2), "neither an A or B"),
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_tensors_that_do_not_fit_are_refused(directory, name):
    key, tensor, words = TENSOR_CHANGES[name]
    set_tensors(directory, **{f"base_model__model__{key}__weight": tensor})
    refused(directory, words)


def test_keys_without_the_prefix_point_to_convert(directory):
    set_tensors(directory, first__lora_A__weight=torch.ones(2, 4))
    refused(directory, "bridge-peft convert")


def test_keys_with_control_characters_are_refused_and_not_printed(directory):
    set_tensors(directory, **{"base_model__model__\x1b[2J\n__lora_A__weight": torch.ones(2, 4)})
    refused(directory, re.escape(r"\x1b[2J\n"))


def test_config_and_tensors_must_name_the_same_modules(directory):
    set_config(directory, target_modules=["first"])
    refused(directory, "tensors for second, which target_modules does not match")
    set_config(directory, target_modules=["first", "second", "third"])
    load_adapter(tiny_model(), directory)
    set_config(directory, target_modules=["first", "second"], exclude_modules=["second"])
    refused(directory, "tensors for second")


def test_a_target_without_tensors_is_refused(directory):
    for letter in "AB":
        set_tensors(directory, **{f"base_model__model__second__lora_{letter}__weight": None})
    refused(directory, "target_modules matches second, for which the file has no tensors")


def test_a_module_that_the_model_lacks_or_cannot_adapt_is_named(directory):
    set_config(directory, target_modules=["first", "second"])
    other = nn.ModuleDict({"first": nn.Linear(4, 3)})
    with pytest.raises(AdapterError, match="adapts second, which ModuleDict does not have"):
        load_adapter(other, directory)
    other = nn.ModuleDict({"first": nn.Linear(4, 3), "second": nn.Conv1d(3, 2, 1)})
    with pytest.raises(AdapterError, match="second, a Conv1d that cannot be adapted"):
        load_adapter(other, directory)


def test_a_model_on_meta_is_refused(directory):
    with torch.device("meta"):
        model = tiny_model()
    with pytest.raises(AdapterError, match="meta device; load the base weights first"):
        load_adapter(model, directory)


def test_tensors_saved_whole_must_fit(directory):
    set_config(directory, modules_to_save=["second"], target_modules=["first"])
    for letter in "AB":
        set_tensors(directory, **{f"base_model__model__second__lora_{letter}__weight": None})
    set_tensors(directory, base_model__model__second__weight=torch.ones(2, 3))
    refused(directory, r"modules_to_save means second, and the file has no second.bias")
    set_tensors(directory, base_model__model__second__bias=torch.ones(3))
    refused(directory, r"second.bias is \(2,\) in the model and \(3,\) in the file")
    set_tensors(directory, base_model__model__second__bias=torch.ones(2))
    loaded = load_adapter(tiny_model(), directory)
    assert torch.equal(loaded["second"].weight, torch.ones(2, 3))
    set_tensors(directory, base_model__model__second__scale=torch.ones(2))
    refused(directory, "second.scale, which is no parameter")


def test_a_merged_or_foreign_adapter_is_not_loaded_into(directory):
    model = load_adapter(tiny_model(), directory)
    merge(model)
    with pytest.raises(AlreadyAdaptedError, match="merged"):
        load_adapter(model, directory)
    with pytest.raises(AlreadyAdaptedError, match="first difference: second"):
        load_adapter(LoRA(target_modules=["first"], dim=2)(tiny_model()), directory)
    trained = LoRA(dim=2)(tiny_model())
    trained["first"].bias.requires_grad_(True)
    with pytest.raises(AlreadyAdaptedError, match=r"first.bias is trained beside"):
        load_adapter(trained, directory)


def test_an_interrupted_save_is_read_with_a_warning_and_finished_by_the_next(directory):
    committed = directory / ".adapter.commit"
    committed.mkdir()
    newer = st.load_file(directory / TENSORS)
    newer[A] = torch.full((2, 4), 7.0)
    (committed / TENSORS).write_bytes(serialize(newer))
    with pytest.warns(UserWarning, match="was interrupted"):
        model = load_adapter(tiny_model(), directory)
    assert torch.equal(model["first"].lora_a.weight, newer[A])
    save_adapter(model, directory)
    assert not committed.exists()
    assert torch.equal(read_adapter(directory).tensors["first"][0], newer[A])


def test_what_a_file_has_no_place_for_is_not_saved(tmp_path):
    linear = LoRA(target_modules=["0"], dim=2)(nn.Sequential(nn.Linear(3, 3)))[0]
    with pytest.raises(AdapterError, match="the model is itself the adapted linear"):
        save_adapter(linear, tmp_path / "out")
    model = LoRA(dim=2)(tiny_model())
    model["first"].weight.requires_grad_(True)
    with pytest.raises(AdapterError, match="first is adapted.*freeze it"):
        save_adapter(model, tmp_path / "out")
    with torch.device("meta"):
        model = LoRA(dim=2)(tiny_model())
    with pytest.raises(AdapterError, match="no values to save"):
        save_adapter(model, tmp_path / "out")
    model = LoRA(target_modules=["first"], dim=2)(
        nn.ModuleDict({"first": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    )
    model["norm"].weight.requires_grad_(True)
    model["norm"].bias.requires_grad_(True)
    with pytest.raises(AdapterError, match="norm is trained.*has buffers"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_our_files_are_byte_for_byte_those_of_safetensors():
    tensors = {
        "b": torch.randn(5, 2).to(torch.bfloat16).t(),
        "a": torch.randn(3, 4),
        "d": torch.randn(2, dtype=torch.float64),
        "c": torch.zeros(0, 3),
        'ü"': torch.ones(2).half(),
    }
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    assert serialize(tensors) == st.save(whole, metadata={"format": "pt"})


def test_all_linear_means_every_linear_but_the_head(tmp_path):
    base = models.gpt2()
    model = LoRA(dim=2)(copy.deepcopy(base))
    save_adapter(model, tmp_path)
    set_config(tmp_path, target_modules="all-linear")
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert adapter_state_dict(loaded).keys() == adapter_state_dict(model).keys()
    set_config(tmp_path, exclude_modules=["c_attn"])
    with pytest.raises(AdapterError, match="tensors for transformer.h.0.attn.c_attn, which"):
        load_adapter(base, tmp_path)


def test_files_that_cannot_be_read_are_told(directory, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", fail)
    refused(directory, f"cannot read .*{CONFIG}: Input/output error")


def test_a_file_larger_than_memory_is_told(directory, monkeypatch):
    real = open

    class Huge:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, size=-1):
            if size < 0:
                raise MemoryError
            return self.file.read(size)

    monkeypatch.setattr(
        "builtins.open",
        lambda path, *a: Huge(real(path, *a)) if str(path).endswith(TENSORS) else real(path, *a),
    )
    refused(directory, "cannot read .*not enough memory")


def test_a_huge_config_is_refused(directory):
    (directory / CONFIG).write_bytes(b" " * 17_000_000)
    refused(directory, "larger than 16,000,000 bytes")


def test_wrapped_linears_are_not_saved_and_not_loaded_into(directory, tmp_path):
    model = nn.ModuleDict(
        {"first": LoRALinear(nn.Linear(4, 3), nn.Linear(4, 3)), "second": nn.Linear(3, 2)}
    )
    with pytest.raises(AdapterError, match="first wraps its base in LoRALinear"):
        save_adapter(model, tmp_path / "out")
    patch_linear_module(model["second"], dim=2)
    model.requires_grad_(False)
    with pytest.raises(AlreadyAdaptedError, match="first wraps its base in LoRALinear"):
        load_adapter(model, directory)


def test_names_that_peft_could_not_tell_apart_are_not_saved(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "head": nn.Linear(3, 3), "xhead": nn.Linear(3, 3)})
    LoRA(target_modules=["a"], dim=2)(model)
    model["head"].requires_grad_(True)
    with pytest.raises(AdapterError, match="head is trained.*rename it or freeze it"):
        save_adapter(model, tmp_path / "out")


def test_a_parameter_of_the_model_itself_is_not_saved(tmp_path):
    model = LoRA(dim=2)(tiny_model())
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(AdapterError, match="a parameter of the model itself"):
        save_adapter(model, tmp_path / "out")


def test_a_saved_parameter_on_meta_is_refused(directory):
    set_config(directory, modules_to_save=["third"])
    set_tensors(directory, base_model__model__third__weight=torch.ones(2, 3))
    model = tiny_model()
    model["third"] = nn.Linear(3, 2, bias=False, device="meta")
    with pytest.raises(AdapterError, match=r"third.weight is on the meta device"):
        load_adapter(model, directory)


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("nothing"), lambda p: p.mkdir()])
def test_a_side_file_that_cannot_be_read_is_not_taken_for_none(directory, tmp_path, make):
    (directory / SIDE).unlink()
    make(directory / SIDE)
    refused(directory, f"{SIDE}")
    (directory / CONFIG).unlink()
    with pytest.raises(AdapterError, match=SIDE):
        convert_adapter(directory, "peft", tmp_path / "out", alpha=4)


def test_paths_that_the_system_refuses_are_told(directory, tmp_path):
    path = tmp_path / ("x" * 300)
    refused(path, "cannot read .*File name too long; pass a path that can be read")
    for source, output in ((path, tmp_path / "out"), (directory, path)):
        with pytest.raises(AdapterError, match="File name too long"):
            convert_adapter(source, "peft", output)
    with pytest.raises(AdapterError, match="cannot write .*File name too long"):
        save_adapter(LoRA()(tiny_model()), path)
