"""`bridge-peft convert`."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from bridge.peft import adapter_state_dict, save_adapter
from bridge.peft.cli import main
from tests.helpers.formats_llama import adapted, base


@pytest.fixture
def peft_dir(tmp_path):
    return save_adapter(adapted(), tmp_path / "peft")


@pytest.fixture
def model_dir(tmp_path):
    base().config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_it_says_how_each_kind_of_module_came_about(peft_dir, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--to", "megatron", "--output", str(out), "--model", str(model_dir)]
    assert main(["convert", str(peft_dir), *arguments]) == 0
    said = capsys.readouterr().out
    assert "linear_qkv ×2" in said and "stacked, rank 9 = 3 + 3 + 3" in said and "exact" in said
    assert "peft -> megatron, dim=9 alpha=18 for all modules" in said
    assert main(["convert", str(out), "--to", "peft", "--output", str(tmp_path / "back")]) == 0
    for path in peft_dir.iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_json_carries_the_errors_of_an_approximation(peft_dir, model_dir, tmp_path, capsys):
    config = str(model_dir / "config.json")  # the file itself will do, too
    arguments = ["--to", "megatron", "--output", str(tmp_path / "out"), "--model", config]
    assert main(["convert", str(peft_dir), *arguments, "--rank", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dim"], report["alpha"]) == (3, 6)
    worst = max(report["modules"], key=lambda module: module["relative_error"])
    assert worst["relative_error"] > 0.01 and "approximated" in worst["how"]


@pytest.mark.parametrize("target", ["megatron", "torchtune"])
def test_the_base_that_the_adapter_names_says_the_heads(model_dir, tmp_path, capsys, target):
    model = adapted()
    model.config._name_or_path = str(model_dir)
    save_adapter(model, tmp_path / "named")
    arguments = [str(tmp_path / "named"), "--to", target]
    assert main(["convert", *arguments, "--output", str(tmp_path / "out")]) == 0
    assert f"heads: as in {model_dir}, which the adapter names" in capsys.readouterr().out
    given = ["--model", str(model_dir), "--output", str(tmp_path / "given")]
    assert main(["convert", *arguments, *given]) == 0
    assert "which the adapter names" not in capsys.readouterr().out
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "given" / path.name).read_bytes()
    (model_dir / "config.json").unlink()
    assert main(["convert", *arguments, "--output", str(tmp_path / "gone")]) == 2
    assert "(--model)" in capsys.readouterr().err


def test_a_base_on_the_hub_is_looked_up_in_the_cache(model_dir, tmp_path, capsys, monkeypatch):
    cache = tmp_path / "hub"
    snapshot = cache / "models--some--llama" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (model_dir / "config.json").rename(snapshot / "config.json")
    (cache / "models--some--llama" / "refs").mkdir()
    (cache / "models--some--llama" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    model = adapted()
    model.config._name_or_path = "some/llama"
    save_adapter(model, tmp_path / "named")
    arguments = [str(tmp_path / "named"), "--to", "megatron", "--output", str(tmp_path / "out")]
    assert main(["convert", *arguments]) == 0
    assert f"heads: as in {snapshot / 'config.json'}" in capsys.readouterr().out


def test_a_bare_file_needs_its_alpha(tmp_path, capsys):
    save_file(adapter_state_dict(adapted()), tmp_path / "a.safetensors")
    arguments = [str(tmp_path / "a.safetensors"), "--to", "peft", "--output", str(tmp_path / "o")]
    assert main(["convert", *arguments]) == 2
    assert "alpha" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert main(["convert", *arguments, "--alpha", "6"]) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--to", "megatron"], "number of heads"),
        (["--to", "megatron", "--model", "nowhere"], "cannot read nowhere/config.json"),
        (["--to", "gguf"], "cannot write 'gguf'"),
        (["--to", "megatron", "--rank", "0"], "rank=0"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(peft_dir, tmp_path, capsys, more, said):
    assert main(["convert", str(peft_dir), "--output", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
