"""A run that is killed, stopped or crashed continues to the very bits of one that was not."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bridge.peft.finetune import callbacks
from bridge.peft.finetune.record import (
    COMPLETE,
    checkpoints,
    continue_spec,
    existing_run,
    write_record,
)
from tests.helpers.cli_fixtures import (
    files_in,
    finetune,
    save_tiny_model,
    sums,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_cpu_thread")
ROOT = Path(__file__).parent.parent
# dropout makes the random state matter, accumulation and several epochs the order of the data
OPTIONS = [
    *("--dim", 4, "--dropout", 0.2, "--learning-rate", 5e-3, "--epochs", 3),
    *("--batch-size", 4, "--gradient-accumulation", 2, "--save-every", 7, "--eval-every", 10),
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    model = save_tiny_model(directory / "model")
    data = write_rows(directory / "train.jsonl", sums(120))
    return ["--model", model, "--data", data, *OPTIONS]


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("complete") / "run"
    assert finetune(*arguments, "--output", output) == 0
    return output


@pytest.fixture
def stopped(arguments, tmp_path, monkeypatch):
    """A run stopped by SIGINT after step 9."""
    stop_after(9, monkeypatch)
    output = tmp_path / "run"
    assert finetune(*arguments, "--output", output) == 128 + signal.SIGINT
    monkeypatch.undo()
    return output


def stop_after(step: int, monkeypatch, times: int = 1) -> None:
    """Press Ctrl-C during one step, once or twice."""
    show = callbacks.ShowProgress.on_step_end

    def press(self, args, state, control, **kwargs):
        show(self, args, state, control, **kwargs)
        if state.global_step == step - 1:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(callbacks.ShowProgress, "on_step_end", press)


def adapter(output: Path) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()


def test_kill_9_then_resume_ends_with_the_same_bits(arguments, uninterrupted, tmp_path):
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "bridge.peft", "finetune", "--output", str(output)]
        + [str(word) for word in arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while len(checkpoints(output)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert not (output / "adapter_model.safetensors").exists()
    assert finetune("--resume", "--output", output) == 0
    assert json.loads((output / "metrics.json").read_text())["resumed_from_step"] >= 14
    assert adapter(output) == adapter(uninterrupted)


def test_ctrl_c_saves_and_says_how_to_resume(arguments, tmp_path, monkeypatch, capsys):
    stop_after(9, monkeypatch)
    output = tmp_path / "my run"
    assert finetune(*arguments, "--output", output) == 130
    printed = capsys.readouterr()
    assert "Stopping after this step, with a checkpoint (again: stop at once)." in printed.out
    fix = f"Continue with: bridge-peft finetune --resume --output '{output}'"
    assert f"Stopped; kept checkpoint-9. {fix}" in printed.out and printed.err == ""
    assert [path.name for path in checkpoints(output)] == ["checkpoint-7", "checkpoint-9"]
    assert not (output / "metrics.json").exists()


def test_stop_then_resume_ends_with_the_same_bits(stopped, uninterrupted, capsys):
    assert finetune("--resume", "--output", stopped) == 0
    assert "resumed from step 9" in capsys.readouterr().out
    assert adapter(stopped) == adapter(uninterrupted)


FUNCTIONS = [
    ("--lora-plus-ratio", 16),
    ("--use-dora",),
    ("--freeze-a",),
    ("--lora-a-init-method", "pissa", "--lora-plus-ratio", 4),
]


@pytest.mark.parametrize("flags", FUNCTIONS, ids=str)
def test_another_function_stopped_and_resumed_ends_with_the_same_bits(
    arguments, tmp_path, monkeypatch, flags
):
    arguments = [*arguments, "--epochs", 1, *flags]
    whole, cut, plain = (tmp_path / name for name in ("whole", "cut", "plain"))
    assert finetune(*arguments, "--output", whole) == 0
    stop_after(9, monkeypatch)
    assert finetune(*arguments, "--output", cut) == 130
    monkeypatch.undo()
    assert finetune("--resume", "--output", cut) == 0
    assert adapter(cut) == adapter(whole)
    assert finetune(*arguments[: -len(flags)], "--output", plain) == 0
    assert adapter(plain) != adapter(whole)


def test_the_complete_history_is_in_the_curve_of_a_resumed_run(stopped, uninterrupted):
    assert finetune("--resume", "--output", stopped) == 0
    metrics, complete = (
        json.loads((output / "metrics.json").read_text()) for output in (stopped, uninterrupted)
    )
    assert metrics["eval_loss_before"] == complete["eval_loss_before"]
    assert metrics["eval_loss_after"] == complete["eval_loss_after"]
    assert metrics["tokens"] < complete["tokens"]


def test_a_second_ctrl_c_stops_at_once_with_what_there_is(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(callbacks, "_ECHO_SECONDS", -1.0)
    stop_after(9, monkeypatch, times=2)
    assert finetune(*arguments, "--output", tmp_path / "run") == 130
    printed = capsys.readouterr()
    assert "kept checkpoint-7" in printed.out and printed.err == "error: interrupted\n"


def test_the_same_ctrl_c_passed_on_by_torchrun_is_one(arguments, tmp_path, monkeypatch):
    stop_after(9, monkeypatch, times=2)
    assert finetune(*arguments, "--output", tmp_path / "run") == 130
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-9"


def test_sigterm_stops_like_ctrl_c(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks.signal, "SIGINT", signal.SIGTERM)
    stop_after(9, monkeypatch)
    assert finetune(*arguments, "--output", tmp_path / "run") == 128 + signal.SIGTERM
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-9"


def test_signal_handlers_are_given_back(stopped):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_half_written_checkpoint_is_never_taken_for_one(stopped, uninterrupted):
    partial = stopped / ".partial" / "checkpoint-14"
    shutil.copytree(stopped / "checkpoint-9", partial)
    (partial / "training_state.pt").write_bytes(b"half of")
    assert finetune("--resume", "--output", stopped) == 0
    assert adapter(stopped) == adapter(uninterrupted)
    assert not (stopped / ".partial").exists()


def test_a_run_that_died_after_its_last_step_takes_no_other(arguments, uninterrupted, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    for name in ("metrics.json", "adapter_model.safetensors", "loss.png"):
        (output / name).unlink()
    assert finetune("--resume", "--output", output) == 0
    assert adapter(output) == adapter(uninterrupted)
    complete, metrics = (
        json.loads((run / "metrics.json").read_text()) for run in (uninterrupted, output)
    )
    assert metrics["steps"] == metrics["resumed_from_step"] == complete["steps"]
    assert metrics["eval_loss_after"] == complete["eval_loss_after"]
    assert (output / "loss.png").is_file()


def test_intervals_may_change_on_the_way(stopped, uninterrupted, capsys):
    changed = ["--save-every", 1, "--keep-checkpoints", 3, "--log-every", 5]
    assert finetune("--resume", "--output", stopped, *changed) == 0
    last = [path.name for path in checkpoints(stopped)]
    assert last == ["checkpoint-43", "checkpoint-44", "checkpoint-45"]
    assert adapter(stopped) == adapter(uninterrupted)
    assert capsys.readouterr().err == ""


def refused(capsys, output: Path, *given: object) -> str:
    before = files_in(output)
    assert finetune("--resume", "--output", output, *given) == 2
    assert files_in(output) == before
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_resume_with_another_model_rank_or_data_is_refused(stopped, arguments, tmp_path, capsys):
    capsys.readouterr()
    said = refused(capsys, stopped, "--dim", 8)
    assert "--dim is 8 but the run to resume has 4; leave the flag out" in said
    other = save_tiny_model(tmp_path / "other", seed=1)
    assert "--model is" in refused(capsys, stopped, "--model", other)
    assert "--data is" in refused(capsys, stopped, "--data", tmp_path / "more.jsonl")
    assert "--eval-data is" in refused(capsys, stopped, "--eval-data", arguments[3])
    assert "--batch-size is 2" in refused(capsys, stopped, "--batch-size", 2)
    assert "--target-modules is" in refused(capsys, stopped, "--target-modules", "q_proj")


def test_resume_after_the_files_behind_a_run_changed_is_refused(tmp_path, capsys, monkeypatch):
    model = save_tiny_model(tmp_path / "model")
    data = write_rows(tmp_path / "train.jsonl", sums(40))
    output = tmp_path / "run"
    stop_after(3, monkeypatch)
    assert finetune("--model", model, "--data", data, "--output", output, "--dim", 4) == 130
    monkeypatch.undo()
    capsys.readouterr()
    write_rows(data, sums(41))
    assert "the data is not the one that the run in" in refused(capsys, output)
    write_rows(data, sums(40))
    save_tiny_model(model, seed=1)
    assert "the base model is not the one" in refused(capsys, output)


def test_the_same_flags_may_be_given_again(stopped, arguments, uninterrupted):
    assert finetune("--resume", "--output", stopped, *arguments) == 0
    assert adapter(stopped) == adapter(uninterrupted)


def test_an_unfinished_run_is_not_started_over_unasked(stopped, arguments, capsys):
    capsys.readouterr()
    before = files_in(stopped)
    assert finetune(*arguments, "--output", stopped) == 2
    assert "holds an unfinished run; pass --resume to continue it" in capsys.readouterr().err
    assert files_in(stopped) == before


def test_resume_without_a_checkpoint_is_refused(stopped, capsys):
    for checkpoint in checkpoints(stopped):
        shutil.rmtree(checkpoint)
    assert "has no complete checkpoint yet; start it again with --overwrite" in refused(
        capsys, stopped
    )


@pytest.mark.parametrize("name", ["training_state.pt", "adapter_model.safetensors", COMPLETE])
def test_an_incomplete_checkpoint_is_passed_over_with_one_line(
    name, stopped, uninterrupted, capsys
):
    path = checkpoints(stopped)[-1] / name
    path.write_bytes(path.read_bytes()[:-2])
    capsys.readouterr()
    assert finetune("--resume", "--output", stopped) == 0
    printed = capsys.readouterr()
    assert printed.out.count(f"checkpoint-9 is incomplete ({name}): passed over") == 1
    assert "resumed from step 7" in printed.out
    assert adapter(stopped) == adapter(uninterrupted)


def test_an_optimizer_beside_another_adapter_is_refused(stopped, capsys):
    older, newest = checkpoints(stopped)
    shutil.copy(older / "adapter_model.safetensors", newest / "adapter_model.safetensors")
    capsys.readouterr()
    said = refused(capsys, stopped)
    assert "the optimizer's state belongs to another adapter" in said
    assert "remove checkpoint-9 to resume from an earlier one" in said


def test_record_survives_a_round_trip(stopped, tmp_path):
    spec = existing_run(stopped)
    assert spec is not None
    write_record(tmp_path / "copy", spec)
    assert existing_run(tmp_path / "copy") == spec
    half = dataclasses.replace(spec.lora, lora_dtype=torch.bfloat16)
    write_record(tmp_path / "half", dataclasses.replace(spec, lora=half))
    assert existing_run(tmp_path / "half") == dataclasses.replace(spec, lora=half)
    assert continue_spec(spec, {}) == spec
