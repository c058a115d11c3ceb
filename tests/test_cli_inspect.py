"""`bridge-peft inspect` tells what an adapter holds, from its files alone."""

import json

import pytest
import torch

from bridge.peft import LoRA, save_adapter
from bridge.peft.cli import main
from bridge.peft.model.walk import adapted_modules
from tests.helpers import models


@pytest.fixture
def adapter(tmp_path):
    model = LoRA(dim=4, alpha=8, rank_pattern={"v_proj": 2}, dropout=0.1)(models.llama())
    generator = torch.Generator().manual_seed(0)
    for fqn, module in adapted_modules(model):
        if "o_proj" not in fqn:
            module.lora_b.weight.data.normal_(generator=generator)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_json_describes_every_module(adapter, capsys):
    directory, model = adapter
    assert main(["inspect", str(directory), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    adapted = dict(adapted_modules(model))
    assert {row["fqn"] for row in report["modules"]} == set(adapted)
    for row in report["modules"]:
        module = adapted[row["fqn"]]
        update = module.scale * module.lora_b.weight.double() @ module.lora_a.weight.double()
        assert row["update_norm"] == pytest.approx(torch.linalg.norm(update).item(), rel=1e-6)
        assert (row["dim"], row["scale"]) == (module.dim, module.scale)
        assert row["dead"] is ("o_proj" in row["fqn"])
    names = [row["fqn"] for row in report["modules"]]
    assert names == sorted(names)
    assert report["rank"] == 4 and report["dropout"] == 0.1
    assert report["parameters"] == sum(row["parameters"] for row in report["modules"])
    assert all("o_proj" in name for name in report["dead_modules"])


def test_table_names_rank_alpha_targets_and_marks_dead_modules(adapter, capsys):
    directory, _ = adapter
    assert main(["inspect", str(directory)]) == 0
    printed = capsys.readouterr().out
    assert "rank 4, alpha 8, dropout 0.1" in printed
    assert "q_proj" in printed.splitlines()[1]
    dead = [line for line in printed.splitlines() if line.endswith("dead")]
    assert len(dead) == 2 and all("o_proj" in line and "0.000e+00" in line for line in dead)
    assert "warning: 2 of 14 modules are dead" in printed


def test_a_trained_adapter_has_no_warning(tmp_path, capsys):
    model = LoRA(dim=2, use_rslora=True, target_modules="q_proj")(models.llama())
    for _, module in adapted_modules(model):
        module.lora_b.weight.data.fill_(1.0)
    save_adapter(model, tmp_path / "adapter")
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    printed = capsys.readouterr().out
    assert "rank-stabilised" in printed and "warning" not in printed


def test_layer_2_comes_before_layer_10(tmp_path, capsys):
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(11)))
    save_adapter(LoRA(dim=1, target_modules=["10", "2"])(model), tmp_path / "adapter")
    assert main(["inspect", str(tmp_path / "adapter"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["fqn"] for row in report["modules"]] == ["2", "10"]


def test_what_is_not_an_adapter_is_one_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "absent")]) == 2
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 2 and error.count("\n") == 2
