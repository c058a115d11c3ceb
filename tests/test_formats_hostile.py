"""Hostile and damaged adapters, one by one: refused in clear words, the model untouched."""

from __future__ import annotations

import copy
import os
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
from tests.helpers.formats_tiny import (
    CONFIG,
    EXTRA,
    TENSORS,
    A,
    refused,
    set_config,
    set_tensors,
    tiny_adapter,
    tiny_model,
)


@pytest.fixture
def directory(tmp_path):
    return tiny_adapter(tmp_path / "adapter")


#: What a config may ask for that cannot be given, and nothing may drop in silence.
NOT_HONOURED = {
    "lora_bias": True,
    "use_qalora": True,
    "alora_invocation_tokens": [5],
    "layer_replication": [[0, 4], [2, 5]],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"x": 1},
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 8},
    "ensure_weight_tying": True,
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
def test_configs_that_are_not_an_object_are_refused(directory, text):
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
def test_extras_of_wrong_types_are_refused(directory, fields, words):
    set_config(directory, EXTRA, **fields)
    refused(directory, f"bridge_adapter.json: {words}")


def test_absurd_patterns_are_refused_quickly(directory):
    set_config(directory, rank_pattern={f"x{i}": 4 for i in range(50_000)})
    refused(directory, "rank_pattern must be an object of at most")
    set_config(directory, rank_pattern={f"(x{i})*": 4 for i in range(19_000)})
    refused(directory, "takes too long")


@pytest.mark.parametrize("field", ["layers_pattern", "modules_to_save"])
def test_long_lists_of_what_each_name_is_compared_with_are_refused(directory, field):
    set_config(directory, **{field: [f"x{i}" for i in range(1_001)]})
    refused(directory, f"{field} must be at most 1000 names")


def test_a_pickle_is_refused_unread(directory):
    (directory / TENSORS).unlink()
    (directory / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refused(directory, "pickle.*safetensors")


def test_missing_files_are_named(directory, tmp_path):
    refused(tmp_path / "nowhere", "not an adapter directory")
    (directory / TENSORS).unlink()
    refused(directory, f"holds no {TENSORS}")
    (directory / CONFIG).unlink()
    refused(directory, f"holds no {CONFIG}")


@pytest.mark.parametrize("name", [CONFIG, TENSORS, EXTRA])
def test_links_out_of_the_directory_are_refused(directory, tmp_path, name):
    shutil.move(directory / name, tmp_path / name)
    (directory / name).symlink_to(f"../{name}")
    refused(directory, "link out of its directory")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_what_is_not_a_regular_file_is_refused_without_waiting(directory, name, make):
    (directory / name).unlink()
    make(directory / name)
    refused(directory, "regular file")


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
    other = nn.ModuleDict({"first": nn.Linear(4, 3), "second": nn.Bilinear(3, 2, 1)})
    with pytest.raises(AdapterError, match="second, a Bilinear that cannot be adapted"):
        load_adapter(other, directory)
    for second in (nn.Conv1d(3, 2, 1), nn.Embedding(3, 2)):
        other = nn.ModuleDict({"first": nn.Linear(4, 3), "second": second})
        with pytest.raises(AdapterError, match="adapts second as a linear, and in the model it is"):
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
    refused(directory, "second.scale, which is not a parameter")


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
    with pytest.raises(AdapterError, match="norm has buffers"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
def test_an_extra_that_cannot_be_read_is_not_taken_for_none(directory, tmp_path, make):
    (directory / EXTRA).unlink()
    make(directory / EXTRA)
    refused(directory, f"{EXTRA}")
    (directory / CONFIG).unlink()
    with pytest.raises(AdapterError, match=EXTRA):
        convert_adapter(directory, "peft", tmp_path / "out", alpha=4)


def test_paths_that_the_system_refuses_are_told(directory, tmp_path):
    path = tmp_path / ("x" * 300)
    refused(path, "cannot read .*File name too long; pass a path that can be read")
    for source, output in ((path, tmp_path / "out"), (directory, path)):
        with pytest.raises(AdapterError, match="File name too long"):
            convert_adapter(source, "peft", output)
    with pytest.raises(AdapterError, match="cannot write .*File name too long"):
        save_adapter(LoRA()(tiny_model()), path)
