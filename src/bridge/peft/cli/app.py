"""The table of commands, and the one place where a user's error becomes one line and an exit code.

A command lives in its own module and is imported only when it is asked for, so `bridge-peft --help`
does not pay for torch.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer

from bridge.peft.cli.imports import quit_on_interrupt
from bridge.peft.cli.processes import first_to_say, quiet_but_for_the_first
from bridge.peft.errors import AdapterError, MissingExtraError, UnsupportedLinearError
from bridge.peft.version import __version__

COMMANDS = {
    "finetune": "Train an adapter on your data, or run the embedded demo.",
    "plan": "Show what would be adapted and what it costs, on many ranks too; loads no weights.",
    "inspect": "Show what an adapter holds: rank, targets, size of each update.",
    "merge": "Fold adapters into a model directory that plain transformers loads.",
    "resize": "Give an adapter another rank; says how much of each update is kept.",
    "convert": "Write an adapter in the format of PEFT, Megatron or torchtune.",
    "doctor": "Check an adapter, a model, or the two together.",
}

# click's UsageError, wherever this version of typer keeps click
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_NO_SPACE = ("no space left on the disk", "free some or pass another --output")
_MAY_NOT_WRITE = "pass a directory you may write to"
_REFUSED = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EACCES: ("permission denied", _MAY_NOT_WRITE),
    errno.EPERM: ("permission denied", _MAY_NOT_WRITE),
    errno.EROFS: ("read-only file system", _MAY_NOT_WRITE),
}


class _Interrupted(Exception):
    """Ctrl-C, under a name that typer does not swallow."""


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; see `bridge.peft.cli.main`."""
    requested = next((word for word in arguments if word in COMMANDS), None)
    command = typer.main.get_command(_build_app(requested))
    quiet_but_for_the_first()
    try:
        return int(command(arguments, prog_name="bridge-peft", standalone_mode=False) or 0)
    except _UsageError as error:
        return _fail(_with_help(error))
    except (AdapterError, UnsupportedLinearError, MissingExtraError) as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        what, fix = _REFUSED[error.errno]
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{what}{where}; {fix}")
    except _Interrupted:
        return _fail("interrupted", code=130)


def _build_app(requested: str | None) -> typer.Typer:
    """Build the app; only the requested command is imported, the others are names and a line."""
    app = typer.Typer(
        name="bridge-peft",
        help="Low-rank adapters on any linear, in place.",
        epilog="Start with: bridge-peft finetune   (trains the embedded demo in under a minute)",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, summary in COMMANDS.items():
        command = _load(name) if name == requested else _not_loaded
        app.command(name, short_help=summary)(_interruptible(command))
    return app


def _load(name: str) -> Callable[..., Any]:
    with quit_on_interrupt():
        return import_module(f"bridge.peft.cli.{name}").command


def _interruptible(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def run_command(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise _Interrupted from None

    return run_command


def _not_loaded() -> None:
    raise AssertionError("a command that was not asked for ran")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"bridge-peft {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version),
    ] = False,
) -> None:
    """Low-rank adapters on any linear, in place."""


def _with_help(error: Any) -> str:
    """What click says of wrong words, and where to look."""
    text = error.format_message()
    stop = "" if text.endswith((".", "?", ")")) else "."
    context = getattr(error, "ctx", None)
    return f"{text}{stop} See: {context.command_path if context else 'bridge-peft'} --help"


def _fail(message: str, code: int = 2) -> int:
    line = f"error: {' '.join(message.split())}"
    if first_to_say(line):
        print(line, file=sys.stderr, flush=True)
    return code
