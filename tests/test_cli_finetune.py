"""`bridge-peft finetune` leaves what it promises, or says what is wrong and leaves nothing."""

import errno
import json
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import peft
import pytest
import torch
import transformers

from bridge.peft import AdapterError, LoRA, load_adapter
from bridge.peft.finetune import disk, report
from bridge.peft.finetune import metrics as run_metrics
from bridge.peft.finetune.options import TrainingOptions, total_steps
from bridge.peft.finetune.record import checkpoints
from tests.helpers.cli_fixtures import (
    TEMPLATE,
    UNMARKED_TEMPLATE,
    char_tokenizer,
    files_in,
    finetune,
    one_thread,
    save_tiny_model,
    sums,
    write_rows,
)

QUICK = ["--dim", 4, "--steps", 4, "--batch-size", 4]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", sums(300))


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
            *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
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
    assert "adapter weights in float32 over a bfloat16 base" in printed
    assert "no evaluation" in printed and "not measured" in printed
    saved = peft.utils.load_peft_weights(str(output), device="cpu")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["eval_loss_after"] is None and metrics["dtype"] == "bfloat16"


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
    assert "adapter weights in float32 over a quantized base" in capsys.readouterr().out
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


# Bad input: one line, exit code 2, nothing written.


def refused(capsys, output, *arguments) -> str:
    """Run, expect a refusal that leaves `output` as it was, and return its line."""
    before = files_in(output) if output.is_dir() else None
    capsys.readouterr()
    assert finetune("--output", output, *arguments) == 2
    printed = capsys.readouterr()
    assert (files_in(output) if output.is_dir() else None) == before
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert ";" in printed.err or "?" in printed.err or "See: " in printed.err  # the mend
    return printed.err


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
        (["--eval-data", "x"], "the demo brings its own"),
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


def test_a_full_disk_is_told_before_anything_is_written(model, data, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 1000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
    arguments = ("--model", model, "--data", data)
    assert "no disk space for the run" in refused(capsys, tmp_path / "out", *arguments)


# The output directory.


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
    assert "holds files that are no run" in refused(capsys, output, *arguments)
    assert "is a file; pass a directory" in refused(capsys, output / "thesis.tex", *arguments)


def test_a_damaged_run_record_is_one_line(model, data, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "run.json").write_text("{}")
    assert "cannot read" in refused(capsys, output, "--model", model, "--data", data)


# What happens on the way.


def test_a_disk_that_fills_up_keeps_the_newest_checkpoint(
    model, data, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "out"
    save = torch.save

    def save_until_full(value, path, *args, **kwargs):
        if "checkpoint-3/" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save_until_full)
    arguments = ("--model", model, "--data", data, "--output", output, *QUICK)
    assert finetune(*arguments, "--save-every", 1) == 2
    error = capsys.readouterr().err
    assert "no space left on the disk; free some and continue from checkpoint-2" in error
    assert [path.name for path in checkpoints(output)] == ["checkpoint-1", "checkpoint-2"]
    assert not (output / ".partial").exists()
    monkeypatch.setattr(torch, "save", save)
    assert finetune("--resume", "--output", output) == 0


def test_a_thread_that_meets_the_full_disk_leaves_the_telling_to_the_run(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_value.errno))

    def write(number):
        raise OSError(number, os.strerror(number))

    with disk.disk_full_told(tmp_path):
        for number in (errno.ENOSPC, errno.EIO):
            thread = threading.Thread(target=write, args=(number,))
            thread.start()
            thread.join()
    assert told == [errno.EIO]
    with pytest.raises(AdapterError, match="start again with --overwrite"):
        with disk.disk_full_told(tmp_path):
            write(errno.ENOSPC)
    with pytest.raises(OSError, match="rror"), disk.disk_full_told(tmp_path):
        write(errno.EIO)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.EDQUOT, "quota"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), True),
        (RuntimeError("No space left on device (os error 28)"), True),
        (OSError(errno.EIO, "input/output error"), False),
        (ValueError("something else"), False),
    ],
)
def test_a_full_disk_is_recognised_in_each_library_s_words(error, full, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 0)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
    assert disk.is_disk_full(error, tmp_path) is full


@pytest.mark.parametrize(
    ("options", "samples", "processes", "steps"),
    [
        ({"steps": 7}, 100, 1, 7),
        ({"epochs": 1, "batch_size": 8}, 17, 1, 3),
        ({"epochs": 2, "batch_size": 4, "gradient_accumulation": 2}, 17, 1, 6),
        ({"epochs": 1, "batch_size": 4}, 17, 2, 3),
        ({"epochs": 0.5, "batch_size": 1}, 9, 1, 5),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(options, samples, processes, steps):
    assert total_steps(TrainingOptions(**options), samples, processes=processes) == steps


def test_a_run_that_diverges_is_ended_with_the_mend(model, data, tmp_path, capsys):
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
    assert run_metrics.peak_memory_bytes() == 123


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(run_metrics, "_PACKAGES", ("torch", "no-such-package"))
    assert set(run_metrics.versions()) == {"python", "torch"}


def test_a_short_curve_is_not_smoothed_and_a_slope_is_not_shifted():
    assert report._smoothed([1.0] * 5) == []
    slope = [50.0 - i for i in range(50)]
    assert report._smoothed(slope) == pytest.approx(slope)
    zigzag = [(-1.0) ** i for i in range(60)]
    assert max(map(abs, report._smoothed(zigzag)[3:-3])) < 0.2


def test_recipe_survives_the_run_record(finished):
    record = json.loads((finished / "run.json").read_text())
    assert record["lora"]["dim"] == 4 and record["lora"]["rank_pattern"] == {"v_proj": 2}
    assert set(record["lora"]) == {field for field in LoRA.__dataclass_fields__}
    assert record["digests"].keys() == {"base model", "data"}


def test_a_run_reports_to_nobody():
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
