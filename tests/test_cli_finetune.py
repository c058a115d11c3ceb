"""`bridge-peft finetune` leaves what it promises, or says what is wrong and leaves nothing."""

import json
import os

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from bridge.peft import LoRA, load_adapter
from bridge.peft.finetune import report
from bridge.peft.finetune.options import TrainingOptions, total_steps
from bridge.peft.finetune.record import checkpoints
from tests.helpers.cli_fixtures import (
    TEMPLATE,
    UNMARKED_TEMPLATE,
    char_tokenizer,
    finetune,
    save_tiny_model,
    sums,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_cpu_thread")
QUICK = ["--dim", 4, "--steps", 4, "--batch-size", 4]


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    """A finished run: 300 pairs, evaluation data held out."""
    output = tmp_path_factory.mktemp("runs") / "first"
    code = finetune(
        *("--model", model, "--data", data, "--output", output, "--dim", 4, "--epochs", 1),
        *("--learning-rate", 5e-3, "--rank-pattern", "v_proj=2"),
    )
    assert code == 0
    return output


def logits(model):
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_run_leaves_adapter_metrics_curve_logs_and_two_checkpoints(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("adapter_config.json", "adapter_model.safetensors", "bridge_adapter.json"),
        *("run.json", "metrics.json", "loss.png", "logs", "checkpoint-32", "checkpoint-36"),
    }
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "logs").glob("events.out.tfevents.*"))


def test_metrics_say_what_was_trained_and_that_it_learned(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"] - 0.2
    assert metrics["steps"] == 36 and metrics["resumed_from_step"] == 0
    assert (metrics["train_samples"], metrics["eval_samples"]) == (285, 15)
    assert 0 < metrics["trainable_parameters"] < metrics["model_parameters"]
    assert metrics["tokens_per_second"] > 0 and metrics["peak_memory_bytes"] > 1e7
    assert metrics["adapter_bytes"] == (finished / "adapter_model.safetensors").stat().st_size
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["seed"] == 0 and metrics["dtype"] == "float32"


def test_checkpoints_hold_the_adapter_and_not_the_model(finished):
    for checkpoint in checkpoints(finished):
        assert {path.name for path in checkpoint.iterdir()} == {
            *("adapter_config.json", "adapter_model.safetensors", "bridge_adapter.json"),
            *("training_state.pt", "trainer_state.json", "complete.json"),
        }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_result_with_the_same_logits(model, finished):
    ours = load_adapter(transformers.AutoModelForCausalLM.from_pretrained(model), finished)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    untrained = logits(base)
    theirs = peft.PeftModel.from_pretrained(base, finished)
    torch.testing.assert_close(logits(theirs), logits(ours), atol=5e-6, rtol=0)
    assert not torch.allclose(logits(ours), untrained, atol=1e-2)


def test_rank_pattern_reaches_the_adapter(finished):
    ranks = json.loads((finished / "adapter_config.json").read_text())["rank_pattern"]
    assert set(ranks.values()) == {2} and all("v_proj" in name for name in ranks)


def test_summary_says_what_to_do_next(model, data, tmp_path, capsys):
    output = tmp_path / "out put"
    assert finetune("--model", model, "--data", data, "--output", output, *QUICK) == 0
    printed = capsys.readouterr()
    assert f"bridge-peft inspect '{output}'" in printed.out
    assert f'peft.PeftModel.from_pretrained(base, "{output}")' in printed.out
    assert "held out 15 of 300 samples for evaluation" in printed.out
    assert "evaluation loss" in printed.out and "tokens/s" in printed.out
    assert "{'loss'" not in printed.out and printed.err == ""


@pytest.mark.parametrize(
    ("template", "said"),
    [(TEMPLATE, ""), (UNMARKED_TEMPLATE, "<eos> is appended and learned")],
)
def test_messages_train(template, said, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model", template=template)
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    data = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 12)
    output = tmp_path / "out"
    assert finetune("--model", model, "--data", data, "--output", output, *QUICK) == 0
    assert said in capsys.readouterr().out


def test_text_with_its_own_evaluation_data_trains(model, tmp_path, capsys):
    data = write_rows(tmp_path / "text.jsonl", [{"text": f"{i} then {i + 1}"} for i in range(12)])
    output = tmp_path / "out"
    arguments = ("--model", model, "--data", data, "--eval-data", data, "--output", output)
    assert finetune(*arguments, *QUICK, "--eval-every", 2, "--schedule", "constant") == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["train_samples"], metrics["eval_samples"]) == (12, 12)
    assert "step 2/4" in capsys.readouterr().out


def test_bfloat16_base_gets_float32_adapters_and_checkpointing_trains(
    model, data, tmp_path, capsys
):
    output = tmp_path / "out"
    code = finetune(
        *("--model", model, "--data", data, "--output", output, *QUICK),
        *("--dtype", "bfloat16", "--gradient-checkpointing", "--eval-share", 0),
    )
    assert code == 0
    printed = capsys.readouterr().out
    assert "no evaluation" in printed and "not measured" in printed
    saved = peft.utils.load_peft_weights(str(output), device="cpu")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["eval_loss_after"] is None and metrics["dtype"] == "bfloat16"


def test_what_is_planned_over_a_half_precision_base_is_what_is_trained(
    model, data, tmp_path, capsys
):
    arguments = ("--model", model, "--data", data, *QUICK, "--dtype", "bfloat16")
    assert finetune(*arguments, "--output", tmp_path / "out", "--dry-run") == 0
    planned = capsys.readouterr().out
    assert finetune(*arguments, "--output", tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert f"adapter {4 * metrics['trainable_parameters'] / 1000:.1f} kB" in planned
    assert f"AdamW state {8 * metrics['trainable_parameters'] / 1000:.1f} kB" in planned
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["lora"]["lora_dtype"] is None
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_4_bit_base_trains_and_stays_as_it_is(model, data, tmp_path, capsys):
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    small = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=four_bits
    ).save_pretrained(small)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(small)
    output = tmp_path / "out"
    arguments = ("--model", small, "--data", data, "--output", output, "--dim", 4, "--steps", 30)
    assert finetune(*arguments, "--learning-rate", 5e-3) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"] - 0.2
    dense = json.loads((output / "run.json").read_text())
    assert dense["digests"].keys() == {"base model", "data"}
    saved = peft.utils.load_peft_weights(str(output), device="cpu")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_dropping_long_samples_is_said_and_done(model, tmp_path, capsys):
    rows = [*sums(20), {"prompt": "1" * 200, "completion": "2"}]
    data = write_rows(tmp_path / "data.jsonl", rows)
    output = tmp_path / "out"
    arguments = ("--model", model, "--data", data, "--output", output, *QUICK)
    assert finetune(*arguments, "--on-long", "drop", "--eval-share", 0) == 0
    assert "1 of 21 samples are longer than 128 tokens" in capsys.readouterr().out
    assert json.loads((output / "metrics.json").read_text())["train_samples"] == 20


def test_adapted_output_head_is_trained(model, data, tmp_path):
    output = tmp_path / "out"
    arguments = ("--model", model, "--data", data, "--output", output, *QUICK)
    assert finetune(*arguments, "--target-modules", "lm_head", "--learning-rate", 0.01) == 0
    saved = peft.utils.load_peft_weights(str(output), device="cpu")
    assert saved["base_model.model.lm_head.lora_B.weight"].any()
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]


def test_dry_run_prints_the_plan_and_writes_nothing(model, data, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ("--model", model, "--data", data, "--output", output, "--dim", 4)
    assert finetune(*arguments, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj" in printed and "trainable parameters" in printed
    assert "Would train on 285 samples and evaluate on 15; nothing was written." in printed
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "samples", "steps"),
    [
        ({"steps": 7}, 100, 7),
        ({"epochs": 1, "batch_size": 8}, 17, 3),
        ({"epochs": 2, "batch_size": 4, "gradient_accumulation": 2}, 17, 6),
        ({"epochs": 0.5, "batch_size": 1}, 9, 5),
    ],
)
def test_steps_are_counted_as_transformers_would(options, samples, steps, tmp_path):
    options = TrainingOptions(**options)
    assert total_steps(options, samples) == steps
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
    )
    data = [{"x": i} for i in range(samples)]
    trainer = transformers.Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=data)
    counted = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
    assert counted[-1] == steps


def test_a_run_that_diverges_is_ended_with_the_fix(model, data, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ("--model", model, "--data", data, "--output", output, "--warmup", 0)
    assert finetune(*arguments, "--learning-rate", 1e30, "--max-grad-norm", 0) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the ") and " at step " in error and error.count("\n") == 1
    assert "lower --learning-rate" in error and not (output / "metrics.json").exists()


def test_rare_logging_still_logs_a_loss(model, data, tmp_path):
    output = tmp_path / "out"
    arguments = ("--model", model, "--data", data, "--output", output, *QUICK)
    assert finetune(*arguments, "--log-every", 1000, "--eval-share", 0) == 0
    assert json.loads((output / "metrics.json").read_text())["train_loss"] > 0


def test_a_tokenizer_without_special_tokens_trains_and_it_is_said(data, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    char_tokenizer(pad_token=None, eos_token=None).save_pretrained(model)
    output = tmp_path / "out"
    assert finetune("--model", model, "--data", data, "--output", output, *QUICK) == 0
    assert "has no end-of-sequence token" in capsys.readouterr().out


def test_a_terminal_gets_a_bar_that_goes_away(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = tmp_path / "out"
    assert finetune("--model", model, "--data", data, "--output", output, *QUICK) == 0
    printed = capsys.readouterr().out
    assert "training" in printed and "4/4" in printed and "\x1b[?25h" in printed


def test_memory_is_that_of_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert report.peak_memory_bytes() == 123


def test_a_short_curve_is_not_smoothed_and_a_slope_is_not_shifted():
    assert report.smoothed([1.0] * 5) == []
    slope = [50.0 - i for i in range(50)]
    assert report.smoothed(slope) == pytest.approx(slope)
    zigzag = [(-1.0) ** i for i in range(60)]
    assert max(map(abs, report.smoothed(zigzag)[3:-3])) < 0.2


def test_recipe_survives_the_run_record(finished):
    record = json.loads((finished / "run.json").read_text())
    assert record["lora"]["dim"] == 4 and record["lora"]["rank_pattern"] == {"v_proj": 2}
    assert set(record["lora"]) == {field for field in LoRA.__dataclass_fields__}
    assert record["digests"].keys() == {"base model", "data"}


def test_a_run_reports_to_nobody():
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
