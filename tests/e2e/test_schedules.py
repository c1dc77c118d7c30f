"""Functions that run by themselves: only while their App is deployed, and once for each moment."""

import json
import subprocess
import time

from faults import eventually, kill
from running import AEOLIAN

PROGRAM = """
import modal, time

app = modal.App("ticking")
ticks = modal.Queue.from_name("ticks", create_if_missing=True)

@app.function(schedule=SCHEDULE, serialized=True)
def tick():
    modal.Queue.from_name("ticks").put(modal.current_function_call_id())

@app.local_entrypoint()
def main():
    ticks.clear()
    time.sleep(2.5)
    print("ticks of a run:", ticks.len())
"""
TAKE = """
import modal, sys

ticks = modal.Queue.from_name("ticks")
calls = [ticks.get(timeout=30) for _ in range(int(sys.argv[1]))]
print("distinct:", len(set(calls)))
"""


def program(schedule: str) -> str:
    return PROGRAM.replace("SCHEDULE", schedule)


def next_runs(aeolian) -> list[dict]:
    shown = subprocess.run([*AEOLIAN, "status", "--data-dir", str(aeolian.data_dir), "--json"], capture_output=True)
    return [function for function in json.loads(shown.stdout)["schedules"] if function["app_name"] == "ticking"]


def test_a_deployed_function_runs_on_its_schedule_and_only_then(aeolian, tmp_path):
    every_second = program("modal.Period(seconds=1)")
    assert "ticks of a run: 0" in aeolian.run_app(every_second, tmp_path)

    aeolian.deploy(every_second, tmp_path)
    assert "distinct: 3" in aeolian.python(TAKE, tmp_path, args=["3"])
    [before] = next_runs(aeolian)
    assert before["schedule"] == "every 1 s" and before["function_name"] == "tick"

    kill(aeolian, "server")
    assert "distinct: 5" in aeolian.python(TAKE, tmp_path, args=["5"])
    [after] = next_runs(aeolian)
    num_moments = (after["next_at"] - before["next_at"]) / 1.0
    assert abs(num_moments - round(num_moments)) < 0.01, "the moments have moved"

    aeolian.deploy(program("modal.Cron('0 0 1 1 *', timezone='Asia/Kolkata')"), tmp_path)
    [yearly] = next_runs(aeolian)
    assert yearly["schedule"] == "0 0 1 1 * (Asia/Kolkata)"
    assert time.strftime("%m-%d %H:%M", time.gmtime(yearly["next_at"])) == "12-31 18:30"

    aeolian.modal_session(
        ("queue clear ticks --all -y", ""),
        ("queue len ticks", "0"),
        ("app rollback ticking", ""),
    )
    assert "distinct: 2" in aeolian.python(TAKE, tmp_path, args=["2"])
    aeolian.modal("app", "stop", "ticking", "-y")
    eventually(lambda: next_runs(aeolian), "a stopped app has runs to come")
