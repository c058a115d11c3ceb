"""`bridge-peft plan` shows the plan of the recipe without loading weights."""

import json

import pytest
import torch
import transformers

from bridge.peft import LoRA
from bridge.peft.cli import main
from tests.helpers.cli_fixtures import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_table_is_the_plan_of_the_recipe(model, capsys):
    (model / "model.safetensors").write_bytes(b"never read")
    assert main(["plan", "--model", str(model), "--target-modules", "q_proj,v_proj"]) == 0
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(model)
        expected = LoRA(target_modules=["q_proj", "v_proj"]).plan(
            transformers.AutoModelForCausalLM.from_config(config)
        )
    assert capsys.readouterr().out == f"{expected}\n"


def test_json_has_rows_and_totals(model, capsys):
    arguments = ["--json", "--dim", "4", "--rank-pattern", "v_proj=2", "--use-rslora"]
    assert main(["plan", "--model", str(model), *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    ranks = {row["fqn"].rpartition(".")[2]: row["dim"] for row in plan["rows"]}
    assert ranks["v_proj"] == 2 and ranks["q_proj"] == 4
    assert plan["totals"]["trainable"] == sum(row["trainable"] for row in plan["rows"])
    assert plan["rows"][0]["scale"] == 16.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target-modules", "q_prj"], "did you mean 'q_proj'"),
        (["--target-modules", "re:["], "not a valid regex"),
        (["--lora-dtype", "int8"], "unknown dtype 'int8'"),
        (["--dropout-position", "mid"], "dropout_position must be one of"),
        (["--alpha", "nan"], "alpha"),
    ],
)
def test_bad_recipes_are_one_line(model, arguments, said, capsys):
    assert main(["plan", "--model", str(model), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and printed.err.count("\n") == 1
