"""Ctrl-C: what runs may finish, a second one ends everything at once, and nothing stays behind."""

import time
import uuid

import pytest
from faults import eventually, left_of

APP = """
    import time

    import modal

    app = modal.App("stopping")
    runs = modal.Dict.from_name("stopping-runs", create_if_missing=True)

    @app.function(retries=0)
    def work(label, seconds):
        runs[label, "begun"] = runs.get((label, "begun"), 0) + 1
        time.sleep(seconds)
        runs[label, "done"] = runs.get((label, "done"), 0) + 1
        return f"slept {seconds}"
"""

SPAWN = """
    import sys
    import time

    import modal

    label = sys.argv[1]
    runs = modal.Dict.from_name("stopping-runs", create_if_missing=True)
    call = modal.Function.from_name("stopping", "work").spawn(label, float(sys.argv[2]))
    while not runs.get((label, "begun")):
        time.sleep(0.05)
    print(call.object_id)
"""

RESULT = """
    import sys

    import modal

    label, call_id = sys.argv[1:]
    runs = modal.Dict.from_name("stopping-runs")
    print(modal.FunctionCall.from_id(call_id).get(timeout=60), runs[label, "begun"], runs[label, "done"])
"""


class Work:
    """One input, by a name of its own."""

    def __init__(self, aeolian, folder):
        self._aeolian, self._folder = aeolian, folder
        self._label, self._call_id = uuid.uuid4().hex, ""

    def start(self, seconds: float) -> None:
        """Returns when a container works on it."""
        args = [self._label, str(seconds)]
        self._call_id = self._aeolian.python(SPAWN, self._folder, "spawn.py", args).strip()

    def result(self) -> str:
        """What it returned, how often it was begun, and how often done."""
        return self._aeolian.python(RESULT, self._folder, "result.py", [self._label, self._call_id])


@pytest.fixture
def work(aeolian, tmp_path):
    aeolian.deploy(APP, tmp_path)
    yield Work(aeolian, tmp_path)
    aeolian.modal("app", "stop", "stopping", "--yes")


def test_what_runs_finishes_before_aeolian_ends_and_its_output_is_kept(aeolian, work):
    work.start(4)
    aeolian.interrupt()
    assert aeolian.wait() == 0
    assert left_of(aeolian.data_dir) == []
    aeolian.start()
    assert work.result() == "slept 4.0 1 1\n"


def test_a_second_ctrl_c_ends_everything_at_once_and_the_input_runs_again_later(aeolian, work):
    work.start(6)
    aeolian.interrupt()
    time.sleep(0.5)
    aeolian.interrupt()
    assert aeolian.wait() == 0
    eventually(lambda: left_of(aeolian.data_dir), "this stayed behind")
    aeolian.start()
    assert work.result() == "slept 6.0 2 1\n"
