"""Adapters of mlx_lm: y = W x + scale · (x lora_a) lora_b, both ways."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.peft import AdapterError, LoRA, load_adapter, save_adapter
from bridge.peft.cli import main
from bridge.peft.formats.convert.adapters import convert_adapter
from tests.helpers import models
from tests.helpers.formats_llama import LAYOUT, adapted, base

NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def mlx_directory(directory, names=NAMES, scale=20.0, **config):
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_a"] = torch.randn(32, 4, generator=generator)
        tensors[f"{name}.lora_b"] = torch.randn(4, 32, generator=generator) * 0.1
    directory.mkdir()
    save_file(tensors, directory / "adapters.safetensors", metadata={"format": "mlx"})
    parameters = {"rank": 4, "scale": scale, "dropout": 0.1}
    told = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": parameters}
    (directory / "adapter_config.json").write_text(json.dumps(told | config))
    return tensors


def test_the_update_is_mlx_lms_formula_and_needs_no_alpha(tmp_path):
    tensors = mlx_directory(tmp_path / "mlx")
    convert_adapter(tmp_path / "mlx", "peft", tmp_path / "peft")
    loaded = load_adapter(models.llama(), tmp_path / "peft")
    for name in NAMES:
        layer = loaded.get_submodule(name)
        wanted = 20.0 * tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]
        update = layer.scale * layer.lora_b.weight @ layer.lora_a.weight
        torch.testing.assert_close(update, wanted.T)
        assert layer.dropout.p == 0.1
    convert_adapter(tmp_path / "mlx", "peft", tmp_path / "agreed", alpha=80)
    with pytest.raises(AdapterError, match="alpha 8 is given.*says 80"):
        convert_adapter(tmp_path / "mlx", "peft", tmp_path / "other", alpha=8)


def test_there_and_back_gives_the_same_files(tmp_path):
    save_adapter(adapted(["q_proj", "up_proj"]), tmp_path / "peft")
    convert_adapter(tmp_path / "peft", "mlx", tmp_path / "mlx", layout=LAYOUT)
    told = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert told["fine_tune_type"] == "lora" and told["num_layers"] == 2
    assert told["lora_parameters"]["keys"] == ["mlp.up_proj", "self_attn.q_proj"]
    theirs = load_file(tmp_path / "mlx" / "adapters.safetensors")
    ours = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for key, tensor in theirs.items():
        fqn, _, half = key.rpartition(".lora_")
        original = ours[f"base_model.model.{fqn}.lora_{half.upper()}.weight"]
        assert torch.equal(tensor, original.T)
    convert_adapter(tmp_path / "mlx", "peft", tmp_path / "back")
    for path in (tmp_path / "peft").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_the_last_layers_are_counted(tmp_path):
    model = LoRA(target_modules=["*.layers.1.*.q_proj"], dim=2)(base())
    save_adapter(model, tmp_path / "peft")
    convert_adapter(tmp_path / "peft", "mlx", tmp_path / "mlx", layout=LAYOUT)
    assert json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["num_layers"] == 1


NOT_FOR_MLX = {
    "a layer is left out": (["*.layers.0.*.q_proj"], "layer 1 is not adapted"),
    "one more linear in a layer": (["q_proj", "*.layers.1.*.up_proj"], "up_proj of layer 0"),
    "a linear outside the layers": (["q_proj", "lm_head"], "lm_head is not in a layer"),
}


@pytest.mark.parametrize("what", NOT_FOR_MLX)
def test_what_mlx_lm_would_adapt_otherwise_is_refused(tmp_path, what):
    targets, words = NOT_FOR_MLX[what]
    save_adapter(LoRA(target_modules=targets, dim=2)(base()), tmp_path / "peft")
    with pytest.raises(AdapterError, match=words):
        convert_adapter(tmp_path / "peft", "mlx", tmp_path / "mlx", layout=LAYOUT)
    assert not (tmp_path / "mlx").exists()


def test_two_ranks_are_refused(tmp_path):
    model = LoRA(target_modules=["q_proj"], dim=2, rank_pattern={"*.layers.1.*": 3})(base())
    save_adapter(model, tmp_path / "peft")
    with pytest.raises(AdapterError, match="differ in rank or scale"):
        convert_adapter(tmp_path / "peft", "mlx", tmp_path / "mlx", layout=LAYOUT)


WRONG = {
    "dora": ({"fine_tune_type": "dora"}, "fine_tune_type='dora' of mlx_lm is not supported yet"),
    "no scale": ({"lora_parameters": {"rank": 4, "alpha": 8}}, "must hold mlx_lm's scale"),
    "a scale of text": ({"lora_parameters": {"scale": "2"}}, "must hold mlx_lm's scale"),
    "a wild dropout": ({"lora_parameters": {"scale": 2, "dropout": 7}}, "scale and dropout"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, what):
    config, words = WRONG[what]
    mlx_directory(tmp_path / "mlx", **config)
    with pytest.raises(AdapterError, match=words):
        convert_adapter(tmp_path / "mlx", "peft", tmp_path / "peft")


def test_inspect_says_what_it_is_and_how_to_convert_it(tmp_path, capsys):
    mlx_directory(tmp_path / "mlx")
    assert main(["inspect", str(tmp_path / "mlx")]) != 0
    assert "format of mlx_lm; bridge-peft convert DIR --to peft" in capsys.readouterr().err
