"""Aeolian as its users get it: a wheel, installed by pip into an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import running

ROOT = Path(__file__).parents[2]
PROGRAM = """
import modal

app = modal.App("installed")

@app.function(serialized=True)
def double(number):
    return 2 * number

@app.local_entrypoint()
def main():
    print("doubled:", double.remote(21))
"""


@pytest.mark.slow
def test_a_wheel_that_pip_installed_runs_apps(tmp_path, monkeypatch):
    def run(*argv: str, **kwargs) -> None:
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        subprocess.run(argv, check=True, env=outside, stdout=subprocess.DEVNULL, timeout=280, **kwargs)

    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=ROOT)
    [wheel] = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", str(tmp_path / "env"))
    python = str(tmp_path / "env/bin/python")
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel))

    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(running, "AEOLIAN", [str(tmp_path / "env/bin/aeolian")])
    aeolian = running.RunningAeolian(tmp_path / "data", running.runtimes()[0]).start()
    try:
        (tmp_path / "user_app.py").write_text(PROGRAM)
        assert "doubled: 42" in aeolian.run(python, "-m", "modal", "run", "user_app.py", cwd=tmp_path)
    finally:
        aeolian.stop()
