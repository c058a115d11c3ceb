"""`bridge-peft merge`: a model that transformers loads, a table, one line for each mistake."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from bridge.peft import AdapterError, LoRA, save_adapter
from bridge.peft.cli import main
from bridge.peft.cli import merge as command
from bridge.peft.model.walk import adapted_modules
from tests.helpers import models

transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def files(tmp_path):
    base = models.llama().eval()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = LoRA(dim=4, seed=1)(base)
    for _, module in adapted_modules(model):
        module.lora_b.weight.data.normal_(std=0.1)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path, model


def merge(home, *words, adapters=("adapter",), output="out"):
    flags = [word for name in adapters for word in ("--adapter", str(home / name))]
    where = ["--model", str(home / "base"), "--output", str(home / output)]
    return main(["merge", *where, *flags, *map(str, words)])


def logits(model):
    with torch.no_grad():
        return model(**models.inputs(model)).logits


def test_it_writes_a_model_that_answers_as_the_adapted_one_and_prints_a_table(files, capsys):
    home, model = files
    assert merge(home) == 0
    out, error = capsys.readouterr()
    assert out.startswith("module") and "|update|/|W|" in out
    assert f"merged model in {home / 'out'}" in out
    assert not error
    loaded = transformers.AutoModelForCausalLM.from_pretrained(home / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_json_holds_the_report(files, capsys):
    home, model = files
    assert merge(home, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output"] == str(home / "out")
    assert {row["fqn"] for row in report["rows"]} == {fqn for fqn, _ in adapted_modules(model)}
    assert report["lost"] == report["notes"] == []


def test_weights_dtype_and_computation_are_passed_on(files, capsys):
    home, _ = files
    words = ("--dtype", "bfloat16", "--compute-dtype", "float64")
    assert merge(home, *words, adapters=("adapter:2", "adapter:-2.0")) == 0
    capsys.readouterr()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(home / "out").eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(home / "base").eval()
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(base.bfloat16()))


def test_an_update_that_is_lost_is_warned_of(files, capsys):
    home, _ = files
    assert merge(home, "--dtype", "bfloat16", adapters=("adapter:1e-6",)) == 0
    assert "warning: in 14 of 14 layers more than half of the update" in capsys.readouterr().out


def test_untie_gives_a_tied_head_its_own_weights(tmp_path, capsys):
    base = models.llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    save_adapter(LoRA(dim=4, target_modules=["lm_head"])(base), tmp_path / "adapter")
    assert merge(tmp_path) == 2
    assert "--untie gives it values of its own" in capsys.readouterr().err
    assert merge(tmp_path, "--untie") == 0


@pytest.mark.parametrize(
    ("word", "parsed"),
    [
        ("a/b", ("a/b", 1.0)),
        ("a/b:0.5", ("a/b", 0.5)),
        ("a/b:-2", ("a/b", -2.0)),
        ("a:b", ("a:b", 1.0)),
        ("a:b:1e-1", ("a:b", 0.1)),
        (":3", (":3", 1.0)),
    ],
)
def test_a_number_after_the_last_colon_is_the_weight(word, parsed):
    assert command.parse_adapter(word) == (Path(parsed[0]), parsed[1])


def test_a_directory_whose_name_ends_in_a_number_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run:2").mkdir()
    assert command.parse_adapter("run:2") == (Path("run:2"), 1.0)
    assert command.parse_adapter("run:2:3") == (Path("run:2"), 3.0)
    with pytest.raises(AdapterError, match=r"weight in 'x:nan' must be finite"):
        command.parse_adapter("x:nan")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--compute-dtype", "bfloat16"], "a merge is computed in torch.float32 or torch.float64"),
        (["--model", "nowhere"], "nowhere does not exist; pass the directory of a base model"),
        (["--adapter", "nowhere"], "nowhere is not an adapter directory"),
        (["--output", "/proc/out"], "cannot write to /proc"),
    ],
)
def test_each_mistake_is_one_line_and_nothing_is_written(files, words, said, capsys):
    home, _ = files
    assert merge(home, *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("error: ")
    assert sorted(path.name for path in home.iterdir()) == ["adapter", "base"]


def test_missing_flags_are_named(capsys):
    assert main(["merge", "--model", "x", "--output", "y"]) == 2
    assert "Missing option '--adapter'" in capsys.readouterr().err


def test_ctrl_c_says_that_the_same_command_continues(files, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "merge_directory", interrupt)
    assert merge(files[0]) == 130
    assert "the same command continues where this one stopped" in capsys.readouterr().err


@pytest.mark.parametrize(("quiet", "seen"), [(0.0, True), (60.0, False)])
def test_a_terminal_gets_a_progress_bar_once_it_takes_a_while(quiet, seen, monkeypatch, capsys):
    monkeypatch.setattr(command, "_QUIET_SECONDS", quiet)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with command._progress_bar() as show:
        show(500, 1000)
        time.sleep(0.01)
        show(1000, 1000)
    assert ("merging" in capsys.readouterr().err) == seen
