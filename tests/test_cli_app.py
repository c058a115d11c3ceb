"""The root command is quick, lists every command, and turns each user error into one line."""

import errno
import logging
import os
import signal
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from bridge.peft import __version__, cli
from bridge.peft.cli import app, main, processes
from bridge.peft.demo.tasks import base_model_dir
from tests.helpers.timing import quickest


def test_root_help_takes_less_than_a_second_and_imports_no_torch():
    probe = (
        "import sys, bridge.peft.cli as c; code = c.main(['--help']); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    results = []

    def ask():
        results.append(
            subprocess.run(
                [sys.executable, "-c", probe],
                capture_output=True,
                text=True,
                env={**os.environ, "COLUMNS": "200"},
            )
        )

    assert quickest(ask, 1) < 1
    result = results[-1]
    assert result.returncode == 0, result.stderr
    for name, summary in app.COMMANDS.items():
        assert name in result.stdout and summary in result.stdout


def test_version_is_the_package_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bridge-peft {__version__}\n"


def test_module_runs_as_the_command(monkeypatch):
    result = subprocess.run(
        [sys.executable, "-m", "bridge.peft", "--version"], capture_output=True, text=True
    )
    assert result.returncode == 0 and __version__ in result.stdout


@pytest.mark.parametrize("name", app.COMMANDS)
def test_help_of_each_command_carries_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"Example: bridge-peft {name} " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plam"], "Did you mean 'plan'"),
        (["plan"], "Missing option '--model'"),
        (["plan", "--model", "x", "--dimm", "3"], "--dimm"),
        (["plan", "--model", "x", "--dim", "three"], "Invalid value for '--dim'"),
        (["inspect"], "Missing argument"),
    ],
)
def test_wrong_words_are_one_line_with_where_to_look(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert said in error and "See: bridge-peft" in error and "--help" in error


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 2, "no space left on the disk"),
        (PermissionError(errno.EACCES, "denied", "out/x"), 2, "permission denied: out/x"),
        (OSError(errno.EROFS, "read-only", "out/x"), 2, "read-only file system: out/x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_machine_refuses_is_one_line(raised, code, said, capsys, monkeypatch):
    def command() -> None:
        raise raised

    monkeypatch.setitem(sys.modules, "bridge.peft.cli.plan", SimpleNamespace(command=command))
    assert main(["plan"]) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "bridge.peft.cli.plan", SimpleNamespace(command=command))
    with pytest.raises(ZeroDivisionError):
        main(["plan"])


def test_other_operating_system_errors_are_not_hidden(monkeypatch):
    def command() -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setitem(sys.modules, "bridge.peft.cli.plan", SimpleNamespace(command=command))
    with pytest.raises(OSError, match="input/output"):
        main(["plan"])


def test_a_reader_that_goes_away_leaves_no_traceback():
    command = f"{sys.executable} -m bridge.peft --help | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in result.stderr


def run_without(packages: list[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run some code in a process in which these packages are not installed."""
    hidden = f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"
    return subprocess.run([sys.executable, "-c", hidden + code], capture_output=True, text=True)


def test_without_typer_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    assert cli.main(["--help"]) == 2
    error = "error: typer is not installed; pip install 'bridge-peft[cli]'\n"
    assert capsys.readouterr().err == error
    module = "import runpy; runpy.run_module('bridge.peft', run_name='__main__')"
    result = run_without(["typer"], module)
    assert result.returncode == 2 and result.stderr == error


FINETUNE_PACKAGES = ["transformers", "trl", "datasets", "accelerate", "matplotlib", "tensorboard"]


def test_commands_on_files_need_no_training_packages(tmp_path):
    code = f"""
from bridge.peft.cli import main
from tests.helpers.timing import quickest
assert [main([name, "--help"]) for name in {list(app.COMMANDS)}] == [0] * {len(app.COMMANDS)}
assert main(["inspect", {str(tmp_path / "absent")!r}]) == 2
assert main(["doctor", "--adapter", {str(tmp_path / "absent")!r}]) == 2
"""
    result = run_without(FINETUNE_PACKAGES, code)
    assert result.returncode == 0, result.stderr
    assert "is not installed" not in result.stderr


def test_commands_that_need_the_training_packages_name_their_extra(tmp_path):
    model = str(base_model_dir())
    commands = [["plan", "--model", model], ["doctor", "--model", model]]
    commands.append(["finetune", "--output", str(tmp_path / "out")])
    code = f"from bridge.peft.cli import main\nassert [main(c) for c in {commands}] == [2, 2, 2]"
    result = run_without(["transformers"], code)
    fix = "error: transformers is not installed; pip install 'bridge-peft[finetune]'\n"
    assert result.returncode == 0 and result.stderr == 3 * fix
    assert not (tmp_path / "out").exists()


def told(rank: int, monkeypatch, capsys) -> str:
    """What one process of two prints of an error that both meet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    for library in ("HF_HUB", "HF_DATASETS"):  # set by the command; given back after the test
        monkeypatch.setenv(f"{library}_DISABLE_PROGRESS_BARS", "1")
    assert main(["doctor"]) == 2
    assert signal.signal(signal.SIGTERM, signal.SIG_DFL) == signal.SIG_IGN  # it leaves by itself
    logging.disable(logging.NOTSET)
    return capsys.readouterr().err


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_under_torchrun_the_process_that_comes_first_tells_the_error(order, monkeypatch, capsys):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    first, second = (told(rank, monkeypatch, capsys) for rank in order)
    assert first.startswith("error: nothing to check") and second == ""


def test_started_several_times_by_another_launcher_the_first_process_tells(monkeypatch, capsys):
    assert told(1, monkeypatch, capsys) == ""
    assert told(0, monkeypatch, capsys).startswith("error: nothing to check")


def test_an_error_is_told_though_the_store_has_gone(monkeypatch, capsys):
    monkeypatch.setattr(processes, "_PATIENCE", timedelta(milliseconds=50))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert told(1, monkeypatch, capsys).startswith("error: nothing to check")
