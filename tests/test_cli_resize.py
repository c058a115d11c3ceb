"""`bridge-peft resize`: a new directory, what was kept, one line for each mistake."""

import json

import pytest

from bridge.peft import LoRA, save_adapter
from bridge.peft.cli import main
from bridge.peft.formats.peft import read_adapter
from bridge.peft.model.walk import adapted_modules
from tests.helpers import models


@pytest.fixture
def adapter(tmp_path):
    model = LoRA(dim=4, alpha=8)(models.llama())
    for _, module in adapted_modules(model):
        module.lora_b.weight.data.normal_()
    return save_adapter(model, tmp_path / "adapter")


def resize(*words):
    return main(["resize", *map(str, words)])


def test_it_writes_an_adapter_of_that_rank_and_prints_what_was_kept(adapter, tmp_path, capsys):
    assert resize(adapter, "--rank", 2, "--output", tmp_path / "small") == 0
    out = capsys.readouterr().out
    assert "energy kept" in out and "least energy kept" in out
    assert f"adapter of rank 2 in {tmp_path / 'small'}" in out
    small = read_adapter(tmp_path / "small")
    assert {small.rank(fqn) for fqn in small.tensors} == {2}
    assert {small.scale(fqn) for fqn in small.tensors} == {2.0}


def test_json_has_a_row_for_each_module(adapter, tmp_path, capsys):
    assert resize(adapter, "--rank", 8, "--output", tmp_path / "large", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["fqn"] for row in report["rows"]} == read_adapter(adapter).tensors.keys()
    assert {(row["old_dim"], row["dim"], row["energy"]) for row in report["rows"]} == {(4, 8, 1.0)}


def test_each_mistake_is_one_line_and_nothing_is_written(adapter, tmp_path, capsys):
    for words, said in (
        ((tmp_path / "none", "--rank", 2, "--output", tmp_path / "x"), "not an adapter directory"),
        ((adapter, "--rank", 0, "--output", tmp_path / "x"), "rank must be an integer >= 1"),
        ((adapter, "--rank", 2, "--output", adapter), "already exists and is not empty"),
        ((adapter, "--rank", 2), "Missing option '--output'"),
    ):
        assert resize(*words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_paths_that_the_system_refuses_are_one_line(adapter, tmp_path, capsys):
    long = tmp_path / ("x" * 300)
    commands = (
        ["resize", adapter, "--rank", 2, "--output", long],
        ["doctor", "--adapter", long],
        ["merge", "--model", tmp_path, "--adapter", f"{long}:0.5", "--output", tmp_path / "out"],
    )
    for command in commands:
        assert main([str(word) for word in command]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
