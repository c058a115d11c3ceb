"""The check-up: a healthy adapter passes, every illness is named, and the patient is unchanged."""

import json

import pytest
import torch
from torch import nn

from bridge.peft import LoRA, save_adapter
from bridge.peft.cli import main
from bridge.peft.doctor import doctor
from bridge.peft.doctor.tensor_checks import used_rank
from bridge.peft.errors import AdapterError
from tests.helpers import models
from tests.helpers.architectures import tiny

RECIPE = LoRA(dim=4, alpha=8, seed=0)


@pytest.fixture
def trained():
    model = RECIPE(models.llama())
    models.train_a_little(model)
    return model


def statuses(report):
    return {check.name: check.status for check in report.checks}


def test_a_trained_model_is_healthy(trained):
    report = doctor(trained)
    assert report.healthy
    assert set(statuses(report).values()) == {"pass"}
    text = str(report)
    assert "no-op at the start" in text and "gradients of the layers" in text
    json.dumps(report.to_dict())


def test_the_model_is_left_exactly_as_it_was(trained):
    trained.train()
    trained.model.layers[0].eval()
    before = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in trained.named_parameters()}
    flags = [m.training for m in trained.modules()]
    trained.zero_grad(set_to_none=True)
    random_state = torch.get_rng_state()
    doctor(trained)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in trained.modules()] == flags
    for name, parameter in trained.named_parameters():
        same, pointer, values = before[name]
        assert parameter is same and parameter.data_ptr() == pointer
        assert torch.equal(parameter, values) and parameter.grad is None


@pytest.mark.parametrize("name", models.ALL)
def test_every_architecture_passes_with_a_fresh_adapter(name):
    report = doctor(RECIPE(models.ALL[name]()))
    assert report.healthy, str(report)
    assert report["dead modules"].status == "warn"


def test_a_base_model_is_checked_with_a_fresh_adapter_on_a_copy():
    model = models.llama()
    report = doctor(model)
    assert report.healthy and report["adapters"].status == "warn"
    assert report["forward and backward of the model"].status == "pass"
    assert not any(hasattr(m, "lora_a") for m in model.modules())


def poison(model):
    model.model.layers[1].mlp.up_proj.lora_a.weight.data[0, 0] = float("nan")


def poison_the_base(model):
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")


def to_meta(model):
    model.to("meta")


def switch_off(model):
    for module in model.modules():
        if hasattr(module, "adapter_enabled"):
            module.adapter_enabled = False


def freeze_a(model):
    model.model.layers[1].mlp.up_proj.lora_a.weight.requires_grad_(False)


def train_a_norm(model):
    model.model.norm.weight.requires_grad_(True)


def one_dead(model):
    model.model.layers[1].mlp.up_proj.lora_b.weight.data.zero_()


def bypass(model):
    layer = model.model.layers[1].mlp.up_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)


def other_dtype(model):
    model.model.layers[1].mlp.up_proj.lora_a.to(torch.bfloat16)


def half(model):
    for module in model.modules():
        if hasattr(module, "lora_a"):
            module.lora_a.half()
            module.lora_b.half()


def tiny_update_in_bf16(model):
    model.bfloat16()
    for module in model.modules():
        if hasattr(module, "lora_b"):
            module.lora_b.weight.data.mul_(1e-4)


def rank_one(model):
    for module in model.modules():
        if hasattr(module, "lora_b"):
            module.lora_b.weight.data[:, 1:] = 0


@pytest.mark.parametrize(
    ("harm", "check", "status", "words"),
    [
        (poison, "NaN and inf", "fail", "1 of 14 .first: model.layers.1.mlp.up_proj"),
        (freeze_a, "what is trained", "fail", "frozen in 1 of 14"),
        (train_a_norm, "what is trained", "warn", "model.norm.weight"),
        (one_dead, "dead modules", "warn", "1 of 14"),
        (bypass, "gradients of the layers", "fail", "1 of 14"),
        (other_dtype, "dtypes", "fail", "1 of 14"),
        (half, "dtypes", "warn", "float16"),
        (tiny_update_in_bf16, "merge forecast", "warn", "more than half"),
        (poison_the_base, "NaN and inf in the base", "fail", "1 of 14 .first: model.layers.1"),
        (to_meta, "state", "fail", "on the meta device, without values: 14 of 14"),
        (switch_off, "state", "warn", "switched off: 14 of 14"),
        (rank_one, "rank used", "warn", "25% of the rank"),
    ],
)
def test_every_illness_is_named_with_its_fix(trained, harm, check, status, words):
    import re

    harm(trained)
    report = doctor(trained)
    found = report[check]
    assert found.status == status and re.search(words, found.detail)
    assert found.fix and found.fix in str(report)
    assert report.healthy is (status != "fail")


def test_file_and_base_together(trained, tmp_path):
    save_adapter(trained, tmp_path)
    torch.manual_seed(0)
    base = models.llama()
    report = doctor(base, tmp_path)
    assert report.healthy and not any(hasattr(m, "lora_a") for m in base.modules())
    assert {"file", "keys and shapes", "fingerprint of the base"} <= set(statuses(report))


def test_another_base_is_noticed(trained, tmp_path):
    save_adapter(trained, tmp_path)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="base"):
        report = doctor(models.llama(), tmp_path)
    assert report["fingerprint of the base"].status == "warn"
    assert doctor(models.llama(hidden_size=64), tmp_path)["keys and shapes"].status == "fail"


def test_a_damaged_file_is_a_failure_and_no_crash(tmp_path):
    report = doctor(adapter=tmp_path)
    assert not report.healthy and report["file"].status == "fail"


def test_the_used_rank_is_that_of_the_product():
    a, b = torch.randn(8, 20), torch.randn(30, 8)
    assert used_rank(a, torch.zeros(30, 8)) == 0
    b[:, 3:] = 0
    assert used_rank(a, b, energy=1 - 1e-9) == 3
    assert used_rank(torch.randn(8, 4), torch.randn(30, 8), energy=1 - 1e-9) == 4


def test_nothing_to_check_is_an_error():
    with pytest.raises(AdapterError, match="needs a model"):
        doctor()


def test_the_command_prints_a_table_or_json_and_answers_by_its_exit_code(trained, tmp_path, capsys):
    save_adapter(trained, tmp_path / "adapter")
    torch.manual_seed(0)
    models.llama().save_pretrained(tmp_path / "base")
    capsys.readouterr()
    arguments = ["doctor", "--adapter", str(tmp_path / "adapter")]
    assert main([*arguments, "--model", str(tmp_path / "base")]) == 0
    assert "fingerprint of the base" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"short")
    assert main(arguments) == 1
    capsys.readouterr()
    assert main(["doctor"]) == 2 and "nothing to check" in capsys.readouterr().err
    assert main(["doctor", "--adapter", str(tmp_path / "none")]) == 2


def test_the_command_says_once_that_the_base_is_another(trained, tmp_path, capsys, recwarn):
    save_adapter(trained, tmp_path / "adapter")
    torch.manual_seed(1)
    models.llama().save_pretrained(tmp_path / "base")
    arguments = ["--adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "base")]
    assert main(["doctor", *arguments]) == 0
    assert "WARN  fingerprint of the base" in capsys.readouterr().out
    assert not [warning for warning in recwarn if "base model" in str(warning.message)]


@pytest.mark.parametrize("harm", [poison, poison_the_base])
def test_nan_is_told_once_and_not_as_the_fault_of_what_computes_with_it(trained, harm):
    harm(trained)
    report = doctor(trained)
    assert [check.status for check in report.checks].count("fail") == 1
    assert report["forward and backward"].status == "skip"


def test_a_model_that_fails_on_its_own_sample_does_not_stop_the_check_up(trained):
    trained.model.embed_tokens.forward = lambda ids: ids.no_such_attribute
    check = doctor(trained)["forward and backward of the model"]
    assert check.status == "skip" and "no_such_attribute" in check.detail


@pytest.mark.parametrize("name", ["vit", "whisper", "t5", "wav2vec2", "wavlm", "mamba", "clip"])
def test_models_of_every_kind_of_input_are_run(name):
    report = doctor(LoRA(dim=2)(tiny(name)))
    assert report["forward and backward of the model"].status in ("pass", "warn"), str(report)
    assert report.healthy


class Unseen(nn.Module):
    """Reads a weight where no source shows it."""

    def __init__(self):
        super().__init__()
        self.used, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x) + x @ dict(self.named_parameters())["read.weight"]


def test_a_linear_that_the_model_reads_past_fails_on_given_inputs():
    report = doctor(LoRA(dim=2)(Unseen()), inputs={"x": torch.randn(2, 8)})
    assert report["forward and backward of the model"].status == "fail"
    assert "never called" in str(report) and not report.healthy
    assert "inputs=" in doctor(LoRA(dim=2)(Unseen()))["forward and backward of the model"].detail


def test_a_base_weight_that_is_computed_has_no_merge_forecast():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    assert doctor(LoRA(dim=2)(model))["merge forecast"].status == "skip"
