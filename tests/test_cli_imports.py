"""Ctrl-C while there is nothing to keep ends the process in one line."""

import signal
import threading

import pytest

from bridge.peft.cli import imports
from bridge.peft.cli.imports import quit_on_interrupt


def test_interrupt_inside_quits_with_130_and_the_handler_comes_back(monkeypatch, capsys):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(imports.os, "_exit", leave)
    with pytest.raises(SystemExit) as left, quit_on_interrupt():
        signal.raise_signal(signal.SIGINT)
    assert left.value.code == 130 and capsys.readouterr().err == "error: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_handler_stays_in_charge():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with quit_on_interrupt():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


def test_other_threads_may_not_set_handlers_and_do_not():
    def enter():
        with quit_on_interrupt():
            entered.append(True)

    entered: list[bool] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]
