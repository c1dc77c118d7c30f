"""`modal serve`: an App that follows its source."""

import signal
import sys

SERVED = """
import os
import time

import modal

app = modal.App("served")


@app.function()
def version():
    return VERSION, os.environ["MODAL_TASK_ID"]


@app.function()
def slow(seconds):
    time.sleep(seconds)
    print("slow is done")
    return VERSION
"""

DRIVER = '''
import json
import subprocess
import sys
import time
from pathlib import Path

import modal

app_id, source = APP_ID, Path("served.py")


def cli(*args):
    command = [sys.executable, "-m", "modal", *args, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def functions():
    return {name: entry["id"] for name, entry in cli("app", "info", app_id)["functions"].items()}


def write_and_wait(text, wanted):
    """Calls until the code is the wanted one; a call never fails."""
    source.write_text(text)
    seen = []
    until = time.monotonic() + 120
    again_at = time.monotonic() + 20
    while time.monotonic() < until:
        seen.append(version.remote()[0])
        if seen[-1] == wanted:
            return seen
        time.sleep(0.05)
        if time.monotonic() > again_at:  # the SDK gives up a reload that takes it longer than 5 s to begin
            source.write_text(text)
            again_at += 20
    raise AssertionError(f"still {seen[-1]}, not {wanted}")


before = functions()
version, slow = (modal.Function.from_id(before[name]) for name in ("version", "slow"))
assert version.remote()[0] == 1
in_flight = slow.spawn(3)
for new in (2, 3):
    text = source.read_text().replace(f"VERSION = {new - 1}", f"VERSION = {new}")
    assert set(write_and_wait(text, new)) <= {new - 1, new}
assert functions() == before, "the same Functions, with new code"
assert in_flight.get() in (1, 2, 3), "a call that ran meanwhile is not lost"

# A broken file changes nothing; the next good one does, and may bring a new Function.
source.write_text(text + "\\nthis is no Python\\n")
time.sleep(3)
assert version.remote()[0] == 3
added = "\\n@app.function()\\ndef added():\\n    return 'added'\\n"
write_and_wait(text.replace("VERSION = 3", "VERSION = 4") + added, 4)
after = functions()
assert set(after) == {"version", "slow", "added"}
assert modal.Function.from_id(after["added"]).remote() == "added"
tasks = {version.remote()[1] for _ in range(5)}
assert len(tasks) == 1
running = [entry for entry in cli("container", "list") if entry["app_id"] == app_id]
assert len(running) <= 3, running
assert [entry["state"] for entry in cli("app", "list") if entry["app_id"] == app_id] == ["ephemeral"]
print("all is well")
'''


def test_a_served_app_follows_its_source_until_it_is_interrupted(aeolian, tmp_path):
    (tmp_path / "served.py").write_text("VERSION = 1\n" + SERVED)
    serving = aeolian.start_command(sys.executable, "-m", "modal", "serve", "served.py", cwd=tmp_path)
    try:
        app_id = next(line for line in serving.stdout if "/apps/ap-" in line).split("/apps/")[1].strip()
        next(line for line in serving.stdout if "Watching" in line)
        assert "all is well" in aeolian.python(DRIVER.replace("APP_ID", repr(app_id)), tmp_path, "driver.py")
    finally:
        serving.send_signal(signal.SIGINT)
        rest = serving.communicate(timeout=30)[0]
    assert "App aborted" in rest
    assert "Traceback" not in rest[rest.rindex("Created objects") :]
    listed = {entry["app_id"]: entry["state"] for entry in aeolian.modal_json("app", "list")}
    assert listed[app_id] == "stopped"
