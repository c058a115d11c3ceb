"""The command says how it read the data, what it decided, and which file an error is about."""

import json

import pytest

from tests.helpers.chat import CHATML, NO_END
from tests.helpers.cli_fixtures import finetune, save_tiny_model, sums, write_rows

CHAT = [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), template=NO_END)


def dry_run(model, tmp_path, *arguments) -> int:
    out = tmp_path / "out"
    return finetune("--model", model, "--output", out, "--dry-run", "--warmup", 0, *arguments)


def test_the_layout_and_what_was_decided_are_said(model, tmp_path, capsys):
    rows = [{"conversations": CHAT, "id": i} for i in range(1024)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    assert dry_run(model, tmp_path, "--data", data) == 0
    said = capsys.readouterr().out
    assert "data: 1,024 rows of ShareGPT conversations, read as messages\n" in said
    assert "data: columns not read: 'id'\n" in said
    assert "data: in 1,024 of 1,024 rows the chat template ends the last answer with no" in said


def test_rows_of_a_table_train_as_those_of_json_lines(model, tmp_path):
    data = tmp_path / "data.csv"
    rows = sums(12)
    data.write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows)
    )
    outputs = [tmp_path / "table", tmp_path / "lines"]
    for file, output in zip((data, write_rows(tmp_path / "d.jsonl", rows)), outputs, strict=True):
        arguments = ("--model", model, "--data", file, "--steps", 2, "--warmup", 0)
        assert finetune(*arguments, "--output", output) == 0
    table, lines = ((output / "adapter_model.safetensors").read_bytes() for output in outputs)
    assert table == lines


def test_evaluation_data_is_named_as_such(model, tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", sums(4))
    other = write_rows(
        tmp_path / "other.jsonl", [*sums(1), {"prompt": "1" * 200, "completion": "2"}]
    )
    assert dry_run(model, tmp_path, "--data", data, "--eval-data", other) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: evaluation data: 1 of 2 samples are longer than 128 tokens")
    assert f"(evaluation data {other}:2)" in said
    write_rows(other, [{"prompt": "a", "completion": 1}])
    assert dry_run(model, tmp_path, "--data", data, "--eval-data", other) == 2
    assert f'evaluation data {other}:1 has "completion" of type int' in capsys.readouterr().err


def test_an_end_token_on_which_the_model_does_not_stop_is_said(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model", template=CHATML, eos_token_id=[5, 6])
    data = write_rows(tmp_path / "data.jsonl", sums(4))
    assert dry_run(model, tmp_path, "--data", data) == 0
    said = (
        "ends a text with <eos> but the model's generation stops on '!', '\"': pass eos_token_id=2"
    )
    assert said in capsys.readouterr().out
