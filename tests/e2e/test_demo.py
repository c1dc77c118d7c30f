"""The example and the demo do what the README says."""

import subprocess
import sys
from pathlib import Path

from running import runtimes

ROOT = Path(__file__).parents[2]


def test_the_example_answers_from_an_index_that_containers_have_built(aeolian):
    output = aeolian.modal("run", "examples/code_search.py", "--query", "least recently used cache", cwd=ROOT)
    assert "24/24" in output
    assert "functools.lru_cache" in output
    assert "index.json" in aeolian.modal("volume", "ls", "code-search")


def test_the_demo_ends_well_and_leaves_nothing():
    done = subprocess.run(
        [sys.executable, "scripts/demo.py", "--runtime", runtimes()[-1]],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
    assert "functools.lru_cache" in done.stdout
    assert "No process, mount or file is left." in done.stdout
