"""Apps, driven by the official client: runs and their ends, deployments and their versions."""

import json
import re
import signal
import sys

VERSIONED = """
import os

import modal

app = modal.App("versioned", tags={"team": "search"})


@app.function()
def hello():
    print("hello of VERSION")
    return "VERSION"


@app.cls()
class Model:
    @modal.method()
    def m(self):
        return "VERSION"
"""

CALLS = """
import sys

import modal

wanted = sys.argv[1]
assert modal.Function.from_name("versioned", "hello").remote() == wanted
assert modal.Cls.from_name("versioned", "Model")().m.remote() == wanted
"""


def test_a_deployed_app_has_versions_that_can_be_listed_and_brought_back(aeolian, tmp_path):
    for version in ("one", "two", "three"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "versioned.py").write_text(VERSIONED.replace("VERSION", version))
    (tmp_path / "calls.py").write_text(CALLS)

    def check_calls(version):
        aeolian.run(sys.executable, "calls.py", version, cwd=tmp_path)

    def deploy(version, *args):
        return aeolian.modal("deploy", f"{version}/versioned.py", *args, cwd=tmp_path)

    assert "App deployed in" in deploy("one")
    assert "no changes detected" in deploy("one")
    assert "App deployed in" in deploy("two", "--tag", "second", "--strategy", "recreate")
    check_calls("two")
    aeolian.modal_session(("app rollback versioned", "rollback successful"))
    check_calls("one")
    _, _, _, history, info, listed, _, logs, *_ = aeolian.modal_session(
        ("app rollover versioned", "Rollover completed"),
        ("app rollback versioned v2", "rollback successful"),
        ("! app rollback versioned v99", "no version v99"),
        ("app history versioned --json", ""),
        ("app info versioned --json", ""),
        ("app list --json", ""),
        ("app list", "versioned"),
        ("app logs versioned", ""),
        ("! app history versionned", "modal app history versioned"),
        ("! app stop versioned", "Are you sure you want to stop"),
    )
    check_calls("two")
    history, info = json.loads(history), json.loads(info)
    assert [entry["version"] for entry in history] == ["v5", "v4", "v3", "v2", "v1"]
    assert [entry["tag"] for entry in history] == ["second", None, None, "second", None]
    assert info["lifecycle"]["state"] == "deployed" and info["lifecycle"]["version"] == 5
    assert set(info["functions"]) == {"hello", "Model.*"}
    app_id = info["app_id"]
    entry = next(entry for entry in json.loads(listed) if entry["app_id"] == app_id)
    assert (entry["description"], entry["state"]) == ("versioned", "deployed")
    assert logs.splitlines() == ["hello of two", "hello of one"]

    aeolian.modal_session(
        ("app stop --yes versioned", ""),
        ("! app stop --yes versioned", "already stopped"),
        (f"app logs {app_id}", "hello of two"),
        (f"app info {app_id}", "stopped"),
    )
    assert "not found" in aeolian.run(sys.executable, "calls.py", "two", cwd=tmp_path, ok=False)
    assert "App deployed in" in deploy("three")
    check_calls("three")
    assert aeolian.modal_json("app", "info", "versioned")["app_id"] != app_id
    aeolian.modal("app", "stop", "--yes", "versioned")


REDEPLOYED = '''
import threading
import time

import modal


def deploy(version, *, min_containers=0, drop=False):
    """Deploys "rolling" again, with new code."""
    app = modal.App("rolling")

    @app.function(serialized=True, name="work", max_containers=2, min_containers=min_containers)
    def work(x, seconds):
        import os, time

        time.sleep(seconds)
        return x, version, os.environ["MODAL_TASK_ID"]

    if not drop:

        @app.function(serialized=True, name="doomed")
        def doomed(x, seconds):
            import time

            time.sleep(seconds)
            return x, version

    @app.cls(serialized=True, max_containers=2)
    class Keeper:
        p: int = modal.parameter(default=0)

        @modal.enter()
        def start(self):
            self.entered = version

        @modal.method()
        def m(self, x):
            return x, version, self.entered

        @modal.method()
        def g(self, n):
            import time

            for i in range(n):
                time.sleep(0.02)
                yield i, version

    app.deploy()
    return time.time()


deploy(0, min_containers=1)
stop = threading.Event()
seen, errors = [], []


def forever(step):
    def loop():
        n = 0
        while not stop.is_set():
            try:
                step(n)
            except Exception as error:
                errors.append(repr(error))
            n += 1

    threads.append(threading.Thread(target=loop, daemon=True))


threads = []
work = modal.Function.from_name("rolling", "work")
Keeper = modal.Cls.from_name("rolling", "Keeper")


def call(n):
    at = time.time()
    x, version, _ = work.remote(n, 0.3 if n % 5 == 0 else 0)
    assert x == n
    seen.append((at, version))


def call_method(n):
    keeper = Keeper(p=n % 2)
    if n % 5 == 4:
        items = list(keeper.g.remote_gen(5))
        assert [i for i, _ in items] == list(range(5)) and len({version for _, version in items}) == 1, items
    else:
        x, version, entered = keeper.m.remote(n)
        assert x == n and version == entered


def map_many(n):
    assert [x for x, _, _ in work.starmap([(k, 0.01) for k in range(30)])] == list(range(30))


for step in (call, call_method, map_many):
    forever(step)
for thread in threads:
    thread.start()


def wait_until_served(version):
    until = time.monotonic() + 60
    while version not in {version for _, version in seen}:
        assert time.monotonic() < until and not errors, (version, seen[-1:], errors)
        time.sleep(0.1)


wait_until_served(0)
doomed = modal.Function.from_name("rolling", "doomed")
long_call = doomed.spawn("kept", 6)
queued = [doomed.with_options(max_containers=1).spawn(i, 0.5) for i in range(4)]
for new in range(1, 6):
    at = deploy(new, min_containers=1, drop=new >= 3)
    wait_until_served(new)
    assert all(version >= new for began, version in seen if began > at), "an old version took a new call"
stop.set()
for thread in threads:
    thread.join()
assert not errors, errors[:3]
# A Function that is no more finishes what it was given.
x, version = long_call.get()
assert x == "kept" and version < 3
assert [call.get()[0] for call in queued] == list(range(4))
try:
    doomed.remote("x", 0)
except modal.exception.NotFoundError as error:
    assert "not part of its App any more" in str(error)
else:
    raise AssertionError("a dropped Function took a call")

# min_containers: warm ones of the new version come without a call.
deploy(6, min_containers=1)
until = time.monotonic() + 60
while not work.get_current_stats().input_headroom:
    assert time.monotonic() < until, work.get_current_stats()
    time.sleep(0.1)
assert work.remote("warm", 0)[1] == 6

# Two clients at once: both succeed, one version after the other.
failed = []


def deploy_or_tell(version):
    try:
        deploy(version)
    except Exception as error:
        failed.append(repr(error))


pair = [threading.Thread(target=deploy_or_tell, args=(version,)) for version in (8, 9)]
for thread in pair:
    thread.start()
for thread in pair:
    thread.join()
assert not failed, failed
assert work.remote("last", 0)[1] in (8, 9)
print("all is well")
'''


def test_a_redeploy_drops_no_call_and_old_code_takes_no_new_one(aeolian, tmp_path):
    assert "all is well" in aeolian.python(REDEPLOYED, tmp_path)
    until_stopped = aeolian.modal("app", "stop", "--yes", "rolling")
    assert "Traceback" not in until_stopped
    assert not [entry for entry in aeolian.modal_json("container", "list") if entry["app_name"] == "rolling"]


INTERRUPTED = """
import time

import modal

app = modal.App("interrupted")


@app.cls()
class Waiter:
    @modal.method()
    def wait(self, seconds):
        print("waiting")
        time.sleep(seconds)

    @modal.exit()
    def leave(self):
        print("the exit hook ran")


@app.function()
def tick(seconds):
    print("ticking")
    for i in range(seconds * 4):
        time.sleep(0.25)
    print("ticked to the end")
    return seconds


@app.local_entrypoint()
def main(kind: str, seconds: int):
    if kind == "class":
        Waiter().wait.remote(seconds)
    elif kind == "map":
        list(tick.map([seconds] * 2))
    else:
        tick.remote(seconds)
"""


def _run_until(aeolian, folder, text, *args):
    process = aeolian.start_command(sys.executable, "-m", "modal", "run", *args, cwd=folder)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            break
    app_id = re.search(r"ap-[A-Za-z0-9]{22}", "".join(lines)).group()
    return process, app_id


def test_an_interrupted_run_ends_its_containers_and_a_detached_one_goes_on(aeolian, tmp_path):
    (tmp_path / "app.py").write_text(INTERRUPTED)
    process, app_id = _run_until(aeolian, tmp_path, "waiting", "app.py", "--kind", "class", "--seconds", "600")
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "terminate your Modal app" in rest and "the exit hook ran" in rest and "App aborted" in rest
    assert "Traceback" not in rest
    detached, detached_id = _run_until(
        aeolian, tmp_path, "ticking", "--detach", "app.py", "--kind", "map", "--seconds", "5"
    )
    detached.send_signal(signal.SIGINT)
    assert "will keep running" in detached.communicate(timeout=60)[0]
    killed, killed_id = _run_until(
        aeolian, tmp_path, "ticking", "--detach", "app.py", "--kind", "call", "--seconds", "600"
    )
    killed.kill()
    killed.communicate(timeout=60)
    states = {entry["app_id"]: (entry["state"], entry["tasks"]) for entry in aeolian.modal_json("app", "list")}
    assert states[app_id] == ("stopped", "0")
    assert states[killed_id][0] == "ephemeral (detached)"
    followed = aeolian.modal("app", "logs", "-f", detached_id)
    assert followed.count("ticked to the end") == 2, followed
    aeolian.modal("app", "stop", "--yes", killed_id)
    states = {entry["app_id"]: (entry["state"], entry["tasks"]) for entry in aeolian.modal_json("app", "list")}
    assert states[detached_id] == states[killed_id] == ("stopped", "0")


SCRIPTED = """
import modal

app = modal.App("scripted", tags={"who": "me"})


@app.function(serialized=True)
def square(x):
    print("squaring", x)
    return x * x


with modal.enable_output():
    with app.run() as running:
        assert running is app and app.app_id.startswith("ap-")
        assert app.get_tags() == {"who": "me"}
        app.set_tags({"who": "you", "also": "this"})
        assert app.get_tags() == {"who": "you", "also": "this"}
        assert square.remote(3) == 9
first_id = app.app_id
with app.run(environment_name="main"):
    assert list(square.map(range(3))) == [0, 1, 4]
try:
    square.remote(1)
except Exception as error:
    print("after the run:", type(error).__name__, error)

try:
    with app.run():
        raise RuntimeError("of the script")
except RuntimeError:
    pass

made = modal.App.lookup("made-by-lookup", create_if_missing=True)
assert modal.App.lookup("made-by-lookup").app_id == made.app_id
try:
    modal.App.lookup("made-by-lookupp")
except modal.exception.NotFoundError as error:
    assert "did you mean 'made-by-lookup'?" in str(error), error
else:
    raise AssertionError("found")
print("made", made.app_id)
"""


def test_scripts_run_apps_tag_them_and_look_them_up(aeolian, tmp_path):
    output = aeolian.python(SCRIPTED, tmp_path)
    assert "squaring 3\n" in output and "squaring 1\n" not in output
    assert "after the run: " in output
    made = output.split("made ")[1].strip()
    listed = {entry["app_id"]: entry for entry in aeolian.modal_json("app", "list")}
    assert listed[made]["state"] == "deployed"
    assert all(entry["state"] == "stopped" for entry in listed.values() if entry["description"] == "scripted")
    aeolian.modal("app", "stop", "--yes", "made-by-lookup")


STOPPED = """
import json
import subprocess
import sys
import threading
import time

import modal

app = modal.App("stopped")


@app.function()
def nap(seconds):
    print("napping")
    for _ in range(seconds * 10):
        time.sleep(0.1)
    return seconds


def cli(*args):
    done = subprocess.run([sys.executable, "-m", "modal", *args], capture_output=True, text=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    app.deploy()
    # A container that is stopped by hand: its input goes to another one, and its logs end.
    call = nap.spawn(2)
    until = time.monotonic() + 60
    while not (running := [c for c in json.loads(cli("container", "list", "--json")) if c["app_name"] == "stopped"]):
        assert time.monotonic() < until
    task_id = running[0]["container_id"]
    cli("container", "stop", "--yes", task_id)
    assert cli("container", "logs", "-f", task_id).startswith("napping\\n")
    assert "already stopped" in cli("container", "stop", "--yes", task_id)
    assert call.get(timeout=60) == 2

    said = {}

    def attempt(name, function):
        try:
            function()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    call = nap.spawn(600)
    waiting = [
        threading.Thread(target=attempt, args=("remote", lambda: nap.remote(600))),
        threading.Thread(target=attempt, args=("map", lambda: list(nap.map([600, 600])))),
        threading.Thread(target=attempt, args=("get", lambda: call.get())),
    ]
    for thread in waiting:
        thread.start()
    time.sleep(1)
    cli("app", "stop", "--yes", "stopped")
    for thread in waiting:
        thread.join()
    for name in ("remote", "map", "get"):
        assert said[name] == f"RemoteError: App {app.app_id} was stopped", said
    attempt("after", lambda: nap.remote(1))
    assert said["after"].startswith("NotFoundError"), said
    print("all is well")
"""


def test_whoever_waits_for_a_stopped_app_is_told(aeolian, tmp_path):
    assert "all is well" in aeolian.python(STOPPED, tmp_path, name="stopped.py")
