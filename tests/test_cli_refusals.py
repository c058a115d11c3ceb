"""`bridge-peft finetune` says in one line what is wrong, exits with 2 and leaves all as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from tests.helpers.cli_fixtures import (
    finetune,
    refused,
    save_tiny_model,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_cpu_thread")
QUICK = ["--dim", 4, "--steps", 4, "--batch-size", 4]


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "first"
    assert finetune("--model", model, "--data", data, "--output", output, *QUICK) == 0
    return output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "./absent"], "no model directory ./absent"),
        (["--model", "someone/absent"], "no model at someone/absent: neither a local directory"),
        (["--model", __file__], "is a file; pass the model's directory"),
        (["--data", "absent.jsonl"], "no data file"),
        (["--eval-data", "absent.jsonl"], "Parquet file with --eval-data"),
        (["--data", Path(__file__).parent], "is a directory; pass a JSONL, JSON, CSV or Parquet"),
        (["--target-modules", "q_prj"], "'q_prj' matches none"),
        (["--max-length", "4"], "300 of 300 samples are longer than 4 tokens"),
        (["--max-length", "129"], "the model knows 128 positions; pass 128 or less"),
        (["--max-length", "1"], "--max-length is 1; pass at least 2"),
        (["--dtype", "fp8"], "--dtype is 'fp8'; pass one of float32, bfloat16, float16"),
        (["--schedule", "poly"], "--schedule is 'poly'; pass one of cosine"),
        (["--on-long", "wrap"], "--on-long is 'wrap'; pass one of error"),
        (["--learning-rate", "0"], "--learning-rate is 0.0; pass a number above 0"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--epochs", "-1"], "--epochs is -1.0"),
        (["--steps", "0"], "--steps is 0; pass 1 or more"),
        (["--steps", "3", "--epochs", "1"], "pass one of them"),
        (["--batch-size", "0"], "--batch-size is 0; pass 1 or more"),
        (["--keep-checkpoints", "0"], "--keep-checkpoints is 0"),
        (["--model", ""], "--model is empty; pass a directory"),
        (["--warmup", "-1"], "--warmup is -1.0; pass 0 or more"),
        (["--warmup", "5", "--steps", "5"], "--warmup is 5 steps and the run has 5, so it would"),
        (["--eval-share", "1"], "--eval-share is 1.0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", 2**32], f"--seed is {2**32}; pass {2**32 - 1} or less"),
        (["--dim", "0"], "dim must be an integer >= 1"),
        (["--dropout", "1"], "dropout must be in [0, 1)"),
        (["--batch-size", "many"], "Invalid value for '--batch-size'"),
        (["--learning", "1"], "No such option: --learning"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--overwrite"], "pass one of them"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, said, model, data, tmp_path, capsys):
    defaults = {"--model": model, "--data": data}
    for name in arguments:
        defaults.pop(name, None)
    given = [word for pair in defaults.items() for word in pair]
    assert said in refused(capsys, tmp_path / "out", *given, *arguments)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("{'text': 1}\n", ":1 is not JSON"),
        ('{"question": "a"}\n', ":1 has columns 'question'"),
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', "split the file"),
        ("\n", "holds no rows"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "has no chat template"),
    ],
)
def test_bad_data_is_one_line_and_writes_nothing(rows, said, model, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(rows)
    assert said in refused(capsys, tmp_path / "out", "--model", model, "--data", data)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "x"], "--model needs --data"),
        (["--data", "x"], "--data needs --model"),
        (["--eval-data", "x"], "the demo has its own"),
    ],
)
def test_half_a_request_is_refused(arguments, said, tmp_path, capsys):
    assert said in refused(capsys, tmp_path / "out", *arguments)


def test_output_is_asked_for(model, data, capsys):
    assert finetune("--model", model, "--data", data) == 2
    assert "pass a directory with --output" in capsys.readouterr().err


def test_float16_is_refused_where_it_cannot_train(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ("--model", model, "--data", data, "--dtype", "float16")
    assert "trains on CUDA only" in refused(capsys, tmp_path / "out", *arguments)


def test_evaluation_data_of_another_shape_is_refused(model, data, tmp_path, capsys):
    other = write_rows(tmp_path / "other.jsonl", [{"text": "a"}])
    arguments = ("--model", model, "--data", data, "--eval-data", other)
    assert "the evaluation data has rows of text" in refused(capsys, tmp_path / "out", *arguments)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "config.json").unlink(), "holds no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "no model at"),
        (lambda d: (d / "model.safetensors").unlink(), "cannot load the weights of"),
        (lambda d: (d / "model.safetensors").write_bytes(b"junk"), "cannot load the weights of"),
        (lambda d: [p.unlink() for p in d.glob("tokenizer*")], "no tokenizer in "),
    ],
)
def test_a_damaged_model_directory_is_one_line(spoil, said, model, data, tmp_path, capsys):
    damaged = shutil.copytree(model, tmp_path / "model")
    spoil(damaged)
    arguments = ("--model", damaged, "--data", data)
    assert said in refused(capsys, tmp_path / "out", *arguments)


def test_a_model_that_lacks_weights_is_refused(model, data, tmp_path, capsys):
    short = save_tiny_model(tmp_path / "model", num_hidden_layers=1)
    shutil.copy(model / "config.json", short)
    arguments = ("--model", short, "--data", data)
    assert "of the model's weights, model.layers.1" in refused(capsys, tmp_path / "out", *arguments)


def test_a_model_that_generates_nothing_is_refused(model, data, tmp_path, capsys):
    directory = tmp_path / "model"
    transformers.ViTConfig(hidden_size=32).save_pretrained(directory)
    arguments = ("--model", directory, "--data", data)
    assert "not a causal language model" in refused(capsys, tmp_path / "out", *arguments)


def test_a_tokenizer_of_another_model_is_refused(data, tmp_path, capsys):
    small = save_tiny_model(tmp_path / "model", vocab_size=30)
    arguments = ("--model", small, "--data", data)
    assert "but the model knows 30 tokens" in refused(capsys, tmp_path / "out", *arguments)


def test_a_finished_run_is_not_touched_without_overwrite(finished, model, data, capsys):
    arguments = ("--model", model, "--data", data)
    assert "holds a finished run" in refused(capsys, finished, *arguments)
    assert "is finished" in refused(capsys, finished, "--resume")


def test_overwrite_replaces_a_run_and_nothing_else(model, data, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ("--model", model, "--data", data, "--output", output, *QUICK)
    assert finetune(*arguments) == 0
    (output / "notes.txt").write_text("mine")
    assert finetune(*arguments, "--overwrite", "--seed", 7) == 0
    assert (output / "notes.txt").read_text() == "mine"
    assert json.loads((output / "run.json").read_text())["options"]["seed"] == 7


def test_overwrite_waits_until_all_checks_have_passed(finished, model, data, capsys):
    arguments = ("--model", model, "--data", data, "--target-modules", "q_prj", "--overwrite")
    assert "matches none" in refused(capsys, finished, *arguments)


def test_directories_of_others_are_not_touched(model, data, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    arguments = ("--model", model, "--data", data, "--overwrite")
    assert "holds files that are not a run" in refused(capsys, output, *arguments)
    assert "is a file; pass a directory" in refused(capsys, output / "thesis.tex", *arguments)


def test_a_damaged_run_record_is_one_line(model, data, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "run.json").write_text("{}")
    assert "cannot read" in refused(capsys, output, "--model", model, "--data", data)
