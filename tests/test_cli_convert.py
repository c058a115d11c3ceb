"""`bridge-peft convert`."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from bridge.peft import adapter_state_dict, save_adapter
from bridge.peft.cli import main
from tests.helpers.formats_llama import adapted, base

HEADS = ["--heads", "4", "--query-groups", "2", "--head-dim", "8"]


@pytest.fixture
def peft_dir(tmp_path):
    return save_adapter(adapted(), tmp_path / "peft")


def test_it_says_how_each_kind_of_module_came_about(peft_dir, tmp_path, capsys):
    base().config.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--to", "megatron", "--output", str(out), "--model", str(tmp_path / "model")]
    assert main(["convert", str(peft_dir), *arguments]) == 0
    said = capsys.readouterr().out
    assert "linear_qkv ×2" in said and "stacked, rank 9 = 3 + 3 + 3" in said and "exact" in said
    assert "peft -> megatron, dim=9 alpha=18 for all modules" in said
    assert main(["convert", str(out), "--to", "peft", "--output", str(tmp_path / "back")]) == 0
    for path in peft_dir.iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_json_carries_the_errors_of_an_approximation(peft_dir, tmp_path, capsys):
    arguments = ["--to", "megatron", "--output", str(tmp_path / "out"), *HEADS]
    assert main(["convert", str(peft_dir), *arguments, "--rank", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dim"], report["alpha"]) == (3, 6)
    worst = max(report["modules"], key=lambda module: module["relative_error"])
    assert worst["relative_error"] > 0.01 and "approximated" in worst["how"]


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
        (["--to", "megatron", "--heads", "4"], "--head-dim"),
        (["--to", "gguf"], "cannot write 'gguf'"),
        (["--to", "megatron", *HEADS, "--rank", "0"], "rank=0"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(peft_dir, tmp_path, capsys, more, said):
    assert main(["convert", str(peft_dir), "--output", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
