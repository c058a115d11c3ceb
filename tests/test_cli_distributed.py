"""`torchrun -m bridge.peft finetune`: any number of processes trains the adapter of one."""

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bridge.peft import AdapterError
from bridge.peft.finetune.batches import BLANK, GlobalBatches
from bridge.peft.finetune.processes import told_together
from tests.helpers.cli_fixtures import finetune
from tests.helpers.distributed_runs import adapter, arguments, cut_short, history, save_inputs
from tests.helpers.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("one_cpu_thread")
ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAYOUTS = ("ddp", "fsdp", "tp")


def on_two_processes(directory: Path) -> None:
    """All that two processes do here, because starting them takes longer than that."""
    errors_are_told_together()
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        dim = 4 + dist.get_rank()
        assert finetune(*arguments(directory), "--dim", dim, "--output", directory / "odd") == 2
    (directory / f"stderr-{dist.get_rank()}").write_text(stderr.getvalue())
    for layout in LAYOUTS:
        output = directory / layout
        assert finetune(*arguments(directory), "--parallel", layout, "--output", output) == 0
    whole = ["--modules-to-train", "lm_head", "--trainable-tokens", "3,5", "--parallel", "fsdp"]
    assert finetune(*arguments(directory), *whole, "--output", directory / "whole") == 0
    dropped = directory / "dropped"
    assert finetune(*arguments(directory), "--dropout", 0.2, "--output", dropped) == 0
    for name in ("dropped", "fsdp", "tp"):
        resumed = cut_short(directory / name, directory / f"{name}-resumed", step=3)
        assert finetune("--resume", "--output", resumed) == 0
    other = cut_short(directory / "one", directory / "one-resumed-by-two", step=3)
    assert finetune("--resume", "--output", other, "--parallel", "tp") == 0


def errors_are_told_together() -> None:
    with pytest.raises(AdapterError, match=r"no rows; add some \(met by process 1 of 2\)"):
        with told_together():
            if dist.get_rank() == 1:
                raise AdapterError("no rows; add some")
    with pytest.raises(AdapterError, match="no rows; add some$"):
        with told_together():
            raise AdapterError("no rows; add some")
    with pytest.raises(AdapterError if dist.get_rank() else ZeroDivisionError, match="division"):
        with told_together():
            assert dist.get_rank() or 1 / 0
    with told_together():
        pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process, then two in every layout; all in this directory."""
    directory = tmp_path_factory.mktemp("runs")
    save_inputs(directory)
    assert finetune(*arguments(directory), "--output", directory / "one") == 0
    whole = ["--modules-to-train", "lm_head", "--trainable-tokens", "3,5"]
    assert finetune(*arguments(directory), *whole, "--output", directory / "one-whole") == 0
    (directory / "ranks").mkdir()
    on_ranks(2, functools.partial(on_two_processes, directory), directory / "ranks")
    return directory


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_the_adapter_of_one(layout, runs):
    one, two = adapter(runs / "one"), adapter(runs / layout)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-4, msg=key)
    mine, theirs = history(runs / layout), history(runs / "one")
    assert len(mine) == len(theirs) and any("eval_loss" in row for row in mine)
    for row, other in zip(mine, theirs, strict=True):
        for key in {"loss", "eval_loss", "grad_norm", "learning_rate"} & {*row, *other}:
            assert row[key] == pytest.approx(other[key], rel=1e-5), (key, row)


@pytest.mark.distributed
def test_what_is_trained_beside_a_sharded_model_is_that_of_one_process(runs):
    one, two = adapter(runs / "one-whole"), adapter(runs / "whole")
    assert any("lm_head" in key for key in one) and any("trainable_tokens" in key for key in one)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-4, msg=key)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_leave_the_files_of_one(layout, runs):
    def files(name):
        found = {path.relative_to(runs / name) for path in (runs / name).rglob("*")}
        return {str(path) for path in found if "tfevents" not in path.name}

    assert files(layout) == files("one")
    for name in ("adapter_config.json", "bridge_adapter.json"):
        assert (runs / layout / name).read_bytes() == (runs / "one" / name).read_bytes()
    metrics, one = (json.loads((runs / n / "metrics.json").read_text()) for n in (layout, "one"))
    assert metrics.keys() == one.keys() and metrics["processes"] == 2
    assert metrics["steps"] == one["steps"] == 10


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["dropped", "fsdp", "tp"])
def test_resumed_on_as_many_processes_it_ends_with_the_same_bits(name, runs):
    metrics = json.loads((runs / f"{name}-resumed" / "metrics.json").read_text())
    assert metrics["resumed_from_step"] == 3
    resumed = (runs / f"{name}-resumed" / "adapter_model.safetensors").read_bytes()
    assert resumed == (runs / name / "adapter_model.safetensors").read_bytes()


@pytest.mark.distributed
def test_resumed_on_other_processes_it_ends_with_the_same_numbers(runs, capsys):
    by_one = cut_short(runs / "fsdp", runs / "fsdp-resumed-by-one", step=3)
    assert finetune("--resume", "--output", by_one) == 0
    assert "was written by 2 processes and this run has 1" in capsys.readouterr().out
    for output in (by_one, runs / "one-resumed-by-two"):
        for key, tensor in adapter(runs / "one").items():
            torch.testing.assert_close(adapter(output)[key], tensor, rtol=0, atol=1e-4, msg=key)


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.distributed
def test_a_users_error_is_printed_once_and_ends_all_processes_alike(tmp_path):
    save_inputs(tmp_path)
    words = ["-m", "bridge.peft", "finetune", *arguments(tmp_path), "--output", tmp_path / "run"]
    result = torchrun(*words, "--batch-size", 7)
    said = "error: --batch-size is 7 samples in all, which 2 processes cannot share evenly"
    assert result.stderr.count("error: ") == result.stderr.count(said) == 1
    assert re.findall(r"exitcode +: (\S+)", result.stderr) == ["2", "2"]
    assert result.stdout == "" and not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_processes_with_other_flags_are_told_before_anything_is_written(runs):
    first, second = ((runs / f"stderr-{rank}").read_text() for rank in range(2))
    assert "do not agree on the recipe (dim: 4 on rank 0, 5 on rank 1)" in first
    assert second == "" and not (runs / "odd").exists()


@pytest.mark.parametrize("samples", [16, 17, 18, 23])
def test_the_parts_of_all_processes_are_the_batch_of_one(samples):
    whole = GlobalBatches(samples, 8, part=0, parts=1, seed=3)
    parts = [GlobalBatches(samples, 8, part=i, parts=4, seed=3) for i in range(4)]
    for sampler in (whole, *parts):
        sampler.set_epoch(1)
    assert len(whole) == len(parts[0]) == len(list(whole))
    for batch, *mine in zip(whole, *parts, strict=True):
        assert [index for part in mine for index in part if index != BLANK] == batch
        assert all(mine)
    assert sorted(index for batch in whole for index in batch) == list(range(samples))
    first = list(GlobalBatches(samples, 8, part=0, parts=1, seed=3))
    assert first != list(whole)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_counted_as_on_one_process(layout, runs):
    mine, one = (json.loads((runs / n / "metrics.json").read_text()) for n in (layout, "one"))
    assert mine["tokens"] == one["tokens"]
