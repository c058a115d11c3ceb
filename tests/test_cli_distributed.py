"""`torchrun -m bridge.peft finetune` trains one adapter with several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli_fixtures import finetune, save_tiny_model, sums, write_rows

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_train_one_adapter_and_no_other_number_resumes_it(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    data = write_rows(tmp_path / "data.jsonl", sums(66))
    output = tmp_path / "run"
    options = ["--dim", "4", "--epochs", "1", "--batch-size", "4", "--eval-share", "0.03"]
    files = ["--model", str(model), "--data", str(data), "--output", str(output)]
    result = subprocess.run(
        [*TORCHRUN, "-m", "bridge.peft", "finetune", *options, *files],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Adapter in") == 1
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["steps"] == 8
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    random_states = sorted(path.name for path in (output / "checkpoint-8").glob("rng_state*"))
    assert random_states == ["rng_state_0.pth", "rng_state_1.pth"]
    (output / "metrics.json").unlink()
    assert finetune("--resume", "--output", output) == 2
    assert "began with 2 processes, not 1" in capsys.readouterr().err
