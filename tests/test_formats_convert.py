"""Any format in, any format out: detection, bare state dicts, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from bridge.peft import adapter_state_dict, load_adapter, save_adapter
from bridge.peft.errors import AdapterError
from bridge.peft.formats.convert.adapters import convert_adapter, detect_format
from bridge.peft.formats.convert.layout import AttentionLayout
from bridge.peft.formats.peft import read_adapter
from tests.helpers.formats_llama import LAYOUT, adapted, base


@pytest.fixture
def model():
    return adapted()


@pytest.fixture
def peft_dir(model, tmp_path):
    return save_adapter(model, tmp_path / "peft")


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("target", ["megatron", "torchtune"])
def test_there_and_back_gives_the_same_bytes(peft_dir, tmp_path, target):
    there = convert_adapter(peft_dir, target, tmp_path / "there", layout=LAYOUT)
    assert (there.source, there.target) == ("peft", target)
    # by which `load_adapter` adapts a Megatron model
    assert (tmp_path / "there" / "adapter_config.json").exists() == (target == "megatron")
    back = convert_adapter(tmp_path / "there", "peft", tmp_path / "back")
    assert (back.source, back.target) == (target, "peft")
    assert files(tmp_path / "back") == files(peft_dir)


def test_megatron_to_torchtune_needs_nothing_but_the_file(peft_dir, tmp_path):
    convert_adapter(peft_dir, "megatron", tmp_path / "m", layout=LAYOUT)
    convert_adapter(tmp_path / "m", "torchtune", tmp_path / "t")
    convert_adapter(tmp_path / "t", "peft", tmp_path / "back")
    assert files(tmp_path / "back") == files(peft_dir)


def _ours(model):
    return adapter_state_dict(model)


def _in_a_full_checkpoint(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def _version_0_2(model):
    names = {"lora_a": "linear_in", "lora_b": "linear_out"}
    return {_renamed(key, names): t for key, t in adapter_state_dict(model).items()}


def _wrapped(model):
    names = {"lora_a": "adapter.linear_in", "lora_b": "adapter.linear_out"}
    return {_renamed(key, names): t for key, t in adapter_state_dict(model).items()}


def _live_peft(model):
    names = {"lora_a": "lora_A.default", "lora_b": "lora_B.default"}
    return {
        f"base_model.model.{_renamed(key, names)}": t
        for key, t in adapter_state_dict(model).items()
    }


def _renamed(key, names):
    fqn, letter, weight = key.rsplit(".", 2)
    return f"{fqn}.{names[letter]}.{weight}"


@pytest.mark.parametrize(
    "as_plain", [_ours, _in_a_full_checkpoint, _version_0_2, _wrapped, _live_peft]
)
def test_bare_state_dicts_become_adapters(model, tmp_path, as_plain):
    save_file(as_plain(model), tmp_path / "state.safetensors")
    done = convert_adapter(tmp_path / "state.safetensors", "peft", tmp_path / "out", alpha=6)
    assert done.source == "plain"
    loaded = load_adapter(base(), tmp_path / "out")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)
    left_out = [step for step in done.steps if "left out" in step.how]
    assert len(left_out) == (as_plain is _in_a_full_checkpoint)


def test_a_bare_peft_state_dict_gets_a_config(peft_dir, tmp_path):
    file = peft_dir / "adapter_model.safetensors"
    (tmp_path / "bare").mkdir()
    file.rename(tmp_path / "bare" / "weights.safetensors")
    convert_adapter(tmp_path / "bare", "peft", tmp_path / "out", alpha=6)
    assert read_adapter(tmp_path / "out").config["lora_alpha"] == 6


def test_what_is_missing_is_asked_for(peft_dir, tmp_path, model):
    with pytest.raises(AdapterError, match="number of heads.*pass the base model's directory"):
        convert_adapter(peft_dir, "megatron", tmp_path / "out")
    save_file(adapter_state_dict(model), tmp_path / "bare.safetensors")
    with pytest.raises(AdapterError, match="alpha"):
        convert_adapter(tmp_path / "bare.safetensors", "peft", tmp_path / "out")
    with pytest.raises(AdapterError, match="leave it out"):
        convert_adapter(peft_dir, "peft", tmp_path / "out", alpha=7)
    assert not (tmp_path / "out").exists()


def test_wrong_requests_are_refused(peft_dir, tmp_path):
    with pytest.raises(AdapterError, match="cannot write 'gguf'"):
        convert_adapter(peft_dir, "gguf", tmp_path / "out")
    with pytest.raises(AdapterError, match="not empty"):
        convert_adapter(peft_dir, "peft", peft_dir)
    with pytest.raises(AdapterError, match="only Megatron"):
        convert_adapter(peft_dir, "peft", tmp_path / "out", rank=4)
    with pytest.raises(AdapterError, match="does not exist"):
        convert_adapter(tmp_path / "nothing", "peft", tmp_path / "out")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_0.pt"])
def test_pickles_are_refused_unread(tmp_path, name):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    for given in (path, path.parent):
        with pytest.raises(AdapterError, match=r"pickle"):
            convert_adapter(given, "peft", tmp_path / "out", alpha=6)


def test_several_files_are_not_guessed_among(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(AdapterError, match="several"):
        convert_adapter(tmp_path, "peft", tmp_path / "out", alpha=6)


def test_unknown_keys_are_shown():
    with pytest.raises(AdapterError, match="'wte.weight'"):
        detect_format(["wte.weight"])


@pytest.mark.parametrize("layout", [3, {"heads": 4}, {"heads": 4, "groups": 3, "head_dim": 8}])
def test_an_extra_with_a_wrong_layout_is_refused(peft_dir, tmp_path, layout):
    convert_adapter(peft_dir, "megatron", tmp_path / "m", layout=LAYOUT)
    extra = tmp_path / "m" / "bridge_adapter.json"
    extra.write_text(json.dumps(json.loads(extra.read_text()) | {"layout": layout}))
    with pytest.raises(AdapterError, match="layout"):
        convert_adapter(tmp_path / "m", "peft", tmp_path / "out")


def test_layout_comes_from_the_model_s_config(tmp_path):
    base().config.save_pretrained(tmp_path)
    assert AttentionLayout.of_model(tmp_path) == LAYOUT
    config = {"model_type": "qwen2", "num_attention_heads": 4, "hidden_size": 64}
    layout = AttentionLayout.of_config({"text_config": config})
    assert layout == AttentionLayout(heads=4, groups=4, head_dim=16, interleaved=False)
    with pytest.raises(AdapterError, match="num_attention_heads"):
        AttentionLayout.of_config({"n_head": 4})
    with pytest.raises(AdapterError, match="cannot read"):
        AttentionLayout.of_model(tmp_path / "nothing")
