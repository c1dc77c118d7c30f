"""The wheel that users install holds everything that the source tree has."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [path] = folder.glob("aeolian-*-py3-none-any.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_the_wheel_holds_every_module_and_migration(wheel):
    source = ROOT / "src"
    expected = {
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path)
    }
    held = set(wheel.namelist())
    assert expected <= held
    assert any(name.startswith("aeolian/storage/migrations/versions/0001_") for name in held)


def test_the_wheel_installs_the_command_and_nothing_beside_the_package(wheel):
    [about] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "aeolian = aeolian.cli.main:main" in wheel.read(about).decode()
    assert {name.split("/")[0] for name in wheel.namelist()} == {"aeolian", about.split("/")[0]}
