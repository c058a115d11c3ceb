"""The `bridge-peft` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `bridge-peft` and return its exit code.

    Args:
        arguments: the words after `bridge-peft`; None takes them from `sys.argv`.

    Returns:
        0 when all went well, 1 when a figure or check does not hold, 2 for an input the user can
        fix (one line on stderr says how), 130 after Ctrl-C.
    """
    try:
        import typer  # noqa: F401
    except ImportError:
        print("error: typer is not installed; pip install 'bridge-peft[cli]'", file=sys.stderr)
        return 2
    from bridge.peft.cli.app import run

    return run(list(sys.argv[1:] if arguments is None else arguments))
