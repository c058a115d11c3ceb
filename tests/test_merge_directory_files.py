"""What lies beside the tensors: tokenizers, templates, sharded adapters, an adapter in the base."""

import json

import pytest
import torch

from bridge.peft import AdapterError
from bridge.peft.cli import main
from bridge.peft.merging.directory import merge_directory
from tests.helpers.directories import case, run, tensors, with_whole_tensor

BASE = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "base"}


def write(directory, files):
    for name, text in files.items():
        (directory / name).write_text(text)


def read(directory):
    names = [*BASE, "special_tokens_map.json", "vocab.json"]
    return {n: (directory / n).read_text() for n in names if (directory / n).is_file()}


BROUGHT = {
    "a template alone": ({"chat_template.jinja": "new"}, BASE | {"chat_template.jinja": "new"}),
    "a whole tokenizer, with no template": (
        {"tokenizer.json": "[]", "tokenizer_config.json": "{}"},
        {"tokenizer.json": "[]", "tokenizer_config.json": "{}"},
    ),
    "a config without words": (
        {"tokenizer_config.json": '{"a": 1}'},
        BASE | {"tokenizer_config.json": '{"a": 1}'},
    ),
}


@pytest.mark.parametrize("what", BROUGHT)
def test_the_adapters_tokenizer_is_the_merged_models_and_the_report_says_so(tmp_path, what):
    brought, wanted = BROUGHT[what]
    files = case(tmp_path)
    write(files.base, BASE)
    write(files.adapter, brought)
    report = run(files)
    assert read(files.out) == wanted
    assert [note for note in report.notes if f"saved beside {files.adapter}" in note]


def test_the_bases_own_tokenizer_beside_an_adapter_is_not_worth_a_word(tmp_path):
    files = case(tmp_path)
    write(files.base, BASE)
    write(files.adapter, {"tokenizer.json": "{}", "tokenizer_config.json": "{}"})
    assert run(files).notes == ()
    assert read(files.out) == BASE


def test_of_two_tokenizers_the_first_counts_and_the_other_is_named(tmp_path):
    files = case(tmp_path)
    other = case(tmp_path / "more").adapter
    write(files.base, BASE)
    for directory, text in ((files.adapter, "one"), (other, "two")):
        write(directory, {"chat_template.jinja": text})
    report = merge_directory(files.base, [(files.adapter, 0.5), (other, 0.5)], files.out)
    assert read(files.out)["chat_template.jinja"] == "one"
    assert any(f"beside {other} differ and are not used" in note for note in report.notes)


def test_a_link_out_of_the_adapters_directory_is_not_followed(tmp_path):
    files = case(tmp_path)
    (tmp_path / "secret").write_text("x")
    (files.adapter / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterError, match="link out of its directory"):
        run(files)
    assert not files.out.exists()


def test_what_is_saved_in_full_is_told_with_its_shape(tmp_path, capsys):
    files = case(tmp_path)
    whole = tmp_path / "whole"
    with_whole_tensor(files.adapter, whole, "model.norm.weight", torch.ones(32))
    report = merge_directory(files.base, [(whole, 1.0)], files.out)
    assert report.notes == ("taken in full from the adapter: model.norm.weight (32)",)
    assert main(["inspect", str(whole)]) == 0
    assert "saved in full, 32 parameters: model.norm.weight 32" in capsys.readouterr().out
    assert main(["inspect", str(whole), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["saved_in_full"]
    assert told == [{"name": "model.norm.weight", "shape": [32], "parameters": 32}]


def test_a_vocabulary_of_which_a_part_is_missing_is_refused(tmp_path):
    files = case(tmp_path)
    whole = tmp_path / "whole"
    with_whole_tensor(files.adapter, whole, "lm_head.weight", torch.ones(67, 32))
    with pytest.raises(AdapterError, match=r"67 tokens instead of 64, and model.embed_tokens.*64"):
        merge_directory(files.base, [(whole, 1.0)], files.out)
    with_whole_tensor(files.adapter, whole, "lm_head.weight", torch.ones(64, 30))
    with pytest.raises(AdapterError, match=r"lm_head.weight is \[64, 30\] in the adapter"):
        merge_directory(files.base, [(whole, 1.0)], files.out)
    assert not files.out.exists()


def test_a_model_directory_that_also_holds_an_adapter_is_refused(tmp_path, capsys):
    files = case(tmp_path)
    for path in files.adapter.iterdir():
        (files.base / path.name).write_bytes(path.read_bytes())
    with pytest.raises(AdapterError, match="holds an adapter beside the model.*move the adapter"):
        run(files)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    train = ["finetune", "--data", str(data), "--output", str(tmp_path / "o"), "--dry-run"]
    for command in (train, ["plan"], ["doctor"]):
        assert main([*command, "--model", str(files.base)]) != 0
        assert "holds an adapter beside the model" in capsys.readouterr().err
    assert not files.out.exists() and tensors(files.base)
