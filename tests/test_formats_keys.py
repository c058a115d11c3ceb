"""Adapter files with odd keys, in several files, or of another kind, beside a PEFT config."""

import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.peft import AdapterError, load_adapter
from bridge.peft.formats.convert.adapters import convert_adapter
from bridge.peft.formats.peft import read_adapter
from tests.helpers import models
from tests.helpers.formats_tiny import refused, tiny_adapter
from tests.helpers.formats_tiny import set_config as set_tiny_config
from tests.helpers.peft_files import (
    CONFIG,
    TENSORS,
    loaded_by_peft,
    logits,
    rename_keys,
    saved_by_peft,
)

P = "base_model.model."
SETTINGS = {
    "target_modules": ["q_proj", "v_proj"],
    "use_rslora": True,
    "rank_pattern": {"layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {"v_proj": 5},
}
ODD_KEYS = {
    "the adapter's name": lambda k: k.replace(".weight", ".default.weight"),
    "another name": lambda k: k.replace(".weight", ".sft-v2.weight"),
    "no prefix": lambda k: k.replace(P, ""),
    "the prefix twice": lambda k: P + k,
    "data parallel outside": lambda k: f"module.{k}",
    "data parallel inside": lambda k: k.replace(P, f"{P}module."),
    "data parallel alone": lambda k: k.replace(P, "module.").replace(".weight", ".x.weight"),
    "compiled": lambda k: k.replace(P, f"{P}_orig_mod."),
    "sharded": lambda k: "_fsdp_wrapped_module." + k.replace("0.", "0._fsdp_wrapped_module."),
    "ours": lambda k: k.replace(P, "").replace("lora_A", "lora_a").replace("lora_B", "lora_b"),
}


def base():
    torch.manual_seed(0)
    return models.llama(initializer_range=0.2)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("theirs")
    return directory, logits(saved_by_peft(base(), directory, **SETTINGS))


def copied(directory, target, change=lambda key: key):
    target.mkdir()
    for name in (CONFIG, TENSORS):
        (target / name).write_bytes((directory / name).read_bytes())
    rename_keys(target, change)
    return target


@pytest.mark.parametrize("kind", ODD_KEYS)
def test_odd_keys_beside_a_config_are_loaded_as_it_says(theirs, tmp_path, kind):
    directory, wanted = theirs
    odd = copied(directory, tmp_path / "odd", ODD_KEYS[kind])
    assert torch.equal(logits(load_adapter(base(), odd)), logits(load_adapter(base(), directory)))
    torch.testing.assert_close(logits(load_adapter(base(), odd)), wanted)


@pytest.mark.parametrize(
    "kind", sorted(ODD_KEYS.keys() - {"the prefix twice", "data parallel inside"})
)
def test_odd_keys_are_converted_for_peft_without_an_alpha(theirs, tmp_path, kind):
    directory, wanted = theirs
    odd = copied(directory, tmp_path / "odd", ODD_KEYS[kind])
    convert_adapter(odd, "peft", tmp_path / "out")
    assert torch.equal(logits(loaded_by_peft(base(), tmp_path / "out")), wanted)


def test_an_alpha_beside_a_config_must_be_the_configs(tmp_path):
    directory = tiny_adapter(tmp_path / "adapter")
    convert_adapter(directory, "peft", tmp_path / "same", alpha=32)
    with pytest.raises(AdapterError, match="alpha 16 is given, and the adapter's config says 32"):
        convert_adapter(directory, "peft", tmp_path / "other", alpha=16)


def test_a_file_of_several_adapters_is_refused_by_their_names(theirs, tmp_path):
    odd = copied(theirs[0], tmp_path / "odd")
    tensors = load_file(odd / TENSORS)
    both = {k.replace(".weight", f".{n}.weight"): t for k, t in tensors.items() for n in "xy"}
    save_file({k: t.clone() for k, t in both.items()}, odd / TENSORS)
    with pytest.raises(AdapterError, match="holds the adapters x, y; save one alone"):
        read_adapter(odd)


def in_shards(directory, *, index):
    tensors = sorted(load_file(directory / TENSORS).items())
    (directory / TENSORS).unlink()
    names = [f"adapter_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        save_file(dict(tensors[i::3]), directory / name)
    if index:
        places = {key: names[i % 3] for i, (key, _) in enumerate(tensors)}
        (directory / f"{TENSORS}.index.json").write_text(json.dumps({"weight_map": places}))
    return names


@pytest.mark.parametrize("index", [True, False])
def test_an_adapter_in_several_files_is_read(theirs, tmp_path, index):
    directory, wanted = theirs
    shards = copied(directory, tmp_path / "shards")
    names = in_shards(shards, index=index)
    torch.testing.assert_close(logits(load_adapter(base(), shards)), wanted)
    convert_adapter(shards, "peft", tmp_path / "one")
    assert torch.equal(logits(loaded_by_peft(base(), tmp_path / "one")), wanted)
    save_file(load_file(shards / names[0]), shards / names[1])
    with pytest.raises(AdapterError, match="in two files"):
        read_adapter(shards)
    os.truncate(shards / names[1], 100)
    with pytest.raises(AdapterError, match="is damaged"):
        read_adapter(shards)
    (shards / names[1]).unlink()
    with pytest.raises(AdapterError, match=r"holds 2 of the 3 files|holds no .*00002"):
        read_adapter(shards)


OTHER_KINDS = {
    "lora_B.bias": "a bias on B",
}


@pytest.mark.parametrize("key", OTHER_KINDS)
def test_tensors_of_another_kind_are_refused_by_its_name(tmp_path, key):
    directory = tiny_adapter(tmp_path / "adapter")
    tensors = load_file(directory / TENSORS) | {f"{P}second.{key}": torch.ones(2)}
    save_file(tensors, directory / TENSORS)
    refused(
        directory, f"second is adapted by {OTHER_KINDS[key]}, which is not supported yet; merge"
    )


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "mica", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_read(tmp_path, init):
    directory = tiny_adapter(tmp_path / "adapter")
    set_tiny_config(directory, init_lora_weights=init, eva_config={"rho": 2.0})
    read_adapter(directory)


def test_unknown_fields_are_named_once_and_ignored_as_in_peft(tmp_path):
    directory = tiny_adapter(tmp_path / "adapter")
    set_tiny_config(directory, of_the_future=7, at_default=None, another="x")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read_adapter(directory)
    assert [str(warning.message) for warning in said] == [
        "adapter_config.json: of_the_future, another: unknown here and ignored, as PEFT does"
    ]
