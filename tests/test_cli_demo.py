"""Without a model and data, `bridge-peft finetune` runs the demo and holds it to its figures."""

import json
from pathlib import Path

import pytest

from bridge.peft.demo.defaults import DEMO_EXAMPLES, DEMO_LORA, DEMO_TRAINING
from bridge.peft.demo.tasks import base_model_dir
from bridge.peft.finetune.record import checkpoints
from tests.helpers.cli_fixtures import (
    files_in,
    finetune,
    one_thread,
    save_tiny_model,
    sums,
    write_rows,
)


@pytest.fixture
def few_questions(monkeypatch):
    monkeypatch.setitem(DEMO_EXAMPLES, "held_out", 40)
    monkeypatch.setitem(DEMO_EXAMPLES, "train", 128)
    with one_thread():
        yield


@pytest.mark.slow
def test_the_demo_holds_what_it_promises(tmp_path, capsys):
    output = tmp_path / "demo"
    code = finetune("--output", output)
    printed = capsys.readouterr().out
    assert code == 0, printed
    metrics = json.loads((output / "metrics.json").read_text())
    figures = metrics["demo"]
    assert figures["exact_match_before"] < 0.05 and figures["exact_match_after"] > 0.90
    assert figures["base_task_before"] == figures["base_task_adapters_disabled"] > 0.9
    assert figures["base_logits_bit_for_bit"] is True
    assert metrics["trainable_parameters"] < 0.1 * metrics["model_parameters"]
    assert metrics["steps"] == DEMO_TRAINING["steps"]
    assert "The demo keeps its promises" in printed and "Held-out questions" in printed
    assert json.loads((output / "adapter_config.json").read_text())["r"] == DEMO_LORA["dim"]


def test_a_demo_that_fails_says_which_figure_and_exits_1(few_questions, tmp_path, capsys):
    assert finetune("--output", tmp_path / "demo", "--steps", 2) == 1
    printed = capsys.readouterr().out
    assert "The demo failed in" in printed and "right in words after" in printed
    assert printed.count("│ fails │") == 1 and printed.count("│ holds │") == 4
    assert (tmp_path / "demo" / "metrics.json").is_file()


def test_the_demo_runs_again_over_itself_but_over_nothing_else(
    few_questions, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        assert finetune("--steps", 2, "--seed", seed) == 1
        assert json.loads(Path("runs/demo/run.json").read_text())["options"]["seed"] == seed
    model = save_tiny_model(tmp_path / "model")
    data = write_rows(tmp_path / "data.jsonl", sums(8))
    output = tmp_path / "mine"
    assert finetune("--model", model, "--data", data, "--output", output, "--steps", 1) == 0
    before = files_in(output)
    capsys.readouterr()
    assert finetune("--output", output) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert files_in(output) == before


def test_the_demo_resumes_as_a_demo(few_questions, tmp_path, capsys):
    output = tmp_path / "demo"
    assert finetune("--output", output, "--steps", 4, "--save-every", 1) == 1
    (output / "metrics.json").unlink()  # as if the process had died after its last checkpoint
    capsys.readouterr()
    assert finetune("--resume", "--output", output) == 1
    assert "The demo failed in" in capsys.readouterr().out
    assert [path.name for path in checkpoints(output)] == ["checkpoint-3", "checkpoint-4"]


def test_the_demo_can_be_planned(tmp_path, capsys):
    assert finetune("--output", tmp_path / "demo", "--dry-run") == 0
    assert "trainable parameters" in capsys.readouterr().out
    assert not (tmp_path / "demo").exists()


def test_the_record_names_the_embedded_model(few_questions, tmp_path):
    finetune("--output", tmp_path / "demo", "--steps", 1)
    record = json.loads((tmp_path / "demo" / "run.json").read_text())
    assert record["demo"] is True and record["model"] == str(base_model_dir())
