"""The files of deploy/ fit what they configure."""

import configparser
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from aeolian.cli.main import main

UNIT = Path(__file__).parents[1] / "deploy/aeolian.service"


def test_the_unit_starts_the_command_with_options_that_it_has():
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    unit.optionxform = str
    unit.read(UNIT)
    program, name, *arguments = unit["Service"]["ExecStart"].split()
    assert program.endswith("/bin/aeolian")
    command = main.get_command(click.Context(main), name)
    assert command is not None
    command.make_context(name, [argument for argument in arguments if not argument.startswith("$")])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path):
    unit = tmp_path / "aeolian.service"
    unit.write_text(UNIT.read_text().replace("/opt/aeolian/bin/aeolian", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if "aeolian.service" in line] == []
