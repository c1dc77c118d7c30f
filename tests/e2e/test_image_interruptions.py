"""Builds of images outlive the processes of Aeolian that are killed in their middle."""

import sys

import pytest
from faults import client

APP = """
import modal, time

def fill():
    for number in range(3):
        print("filling", number, flush=True)
        time.sleep(1)
    open("/made.txt", "w").write("made")

image = (
    modal.Image.debian_slim()
    .run_commands("for i in 0 1 2; do echo step $i; sleep 1; done", force_build=True)
    .run_function(fill, force_build=True)
)
app = modal.App("interrupted", image=image)

@app.function()
def look():
    return open("/made.txt").read()

@app.local_entrypoint()
def main():
    print("found", look.remote())
"""


@pytest.mark.parametrize(("killed", "times"), [("server", 1), ("worker", 2)])
def test_a_build_goes_on_after_a_kill_in_each_of_its_parts(aeolian, tmp_path, killed, times):
    """Only a worker's death makes it begin a part again."""
    (tmp_path / "user_app.py").write_text(APP)
    with client(aeolian, sys.executable, "-m", "modal", "run", "user_app.py", cwd=tmp_path) as running:
        for part in ("step 1", "filling 1"):
            running.wait_for(f"^{part}$")
            aeolian.kill(killed)
        output = running.end()
    assert "found made" in output
    for part in ("step 0", "filling 0"):
        assert output.splitlines().count(part) == times, output
