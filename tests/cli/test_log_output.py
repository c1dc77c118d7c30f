"""Logs as JSON: one object a line, whoever wrote the line."""

import json
import logging
import sys

import pytest

from aeolian.cli.log_output import JsonFormatter, json_line
from aeolian.cli.terminal import Terminal


def record(**more) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "aeolian.some", "levelname": "WARNING", "created": 1.25, **more})


def test_a_record_is_one_object():
    line = json.loads(JsonFormatter("server").format(record(msg="lost %s\nof %d", args=("one", 2))))
    assert line == {
        "time": "1970-01-01T00:00:01.250000Z",
        "level": "WARNING",
        "process": "server",
        "logger": "aeolian.some",
        "message": "lost one\nof 2",
    }


def test_an_exception_is_in_the_line_of_its_record():
    try:
        raise ValueError("no")
    except ValueError:
        text = JsonFormatter("server").format(record(msg="bug", exc_info=sys.exc_info()))
    assert "\n" not in text
    assert json.loads(text)["exception"].endswith("ValueError: no")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_terminal_shows_what_processes_write(tmp_path, capfd, log_format):
    terminal = Terminal(tmp_path, log_format)
    terminal.line("server", json_line("server", "ready") if log_format == "json" else "ready")
    terminal.line("worker", "a line of a library")
    terminal.show("\nWelcome.\n")
    terminal.close()
    shown = capfd.readouterr().out
    if log_format == "text":
        assert shown.splitlines() == ["server  | ready", "worker  | a line of a library", "", "Welcome.", ""]
        return
    lines = [json.loads(line) for line in shown.splitlines()]
    assert [(line["process"], line["message"]) for line in lines] == [
        ("server", "ready"),
        ("worker", "a line of a library"),
        ("aeolian", "Welcome."),
    ]
    assert json.loads((tmp_path / "worker.log").read_text())["message"] == "a line of a library"
