"""What was acknowledged is kept, whatever is killed: the client that runs sees a pause, and nothing else."""

import os
import random
import re
import signal
import sqlite3
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from faults import PARTS, client, eventually, kill, kill_everything, kill_part, left_of


@pytest.fixture(autouse=True)
def no_bugs(aeolian):
    """Whatever was killed, nothing of ours has failed."""
    logs = [aeolian.data_dir / "logs" / f"{name}.log" for name in ("front", "server", "worker")]
    sizes = [log.stat().st_size if log.exists() else 0 for log in logs]
    yield
    for log, size in zip(logs, sizes, strict=True):
        said = log.read_bytes()[size:].decode(errors="replace")
        assert "Traceback" not in said, said[-5000:]


MAP = """
    import sys
    import time

    import modal

    app = modal.App("many")

    @app.function()
    def work(x):
        time.sleep(0.004)
        return x * 3 + 1

    @app.local_entrypoint()
    def main(count: int):
        results = []
        for y in work.map(range(count)):
            results.append(y)
            if len(results) % 10 == 0:
                print(f"got {len(results)}", flush=True)
        assert results == [x * 3 + 1 for x in range(count)]
        assert work.remote(7) == 22
        assert sorted(work.map(range(20), order_outputs=False)) == [x * 3 + 1 for x in range(20)]
        print("all is well")
"""


def killed_map(aeolian, folder: Path, *, count: int, num_kills: int, seed: int) -> None:
    """A map of `count` inputs, with `num_kills` kills spread over its course."""
    (folder / "many.py").write_text(textwrap.dedent(MAP))
    rng = random.Random(seed)
    parts = [PARTS[number % len(PARTS)] for number in range(num_kills)]
    rng.shuffle(parts)
    at = sorted(rng.sample(range(1, count // 10), num_kills))
    with client(aeolian, sys.executable, "-m", "modal", "run", "many.py", "--count", str(count), cwd=folder) as running:
        for part, tens in zip(parts, at, strict=True):
            running.wait_for(rf"^got {10 * tens}$")
            kill_part(aeolian, part, rng)
        assert "all is well" in running.end(300)
    assert num_outputs(aeolian.data_dir) >= count


def num_outputs(data_dir: Path) -> int:
    """Of the largest map; none of its inputs is left."""
    with sqlite3.connect(f"file:{data_dir / 'aeolian.db'}?mode=ro", uri=True) as database:
        query = "SELECT call_id, count(*) FROM outputs GROUP BY call_id ORDER BY 2 DESC LIMIT 1"
        call_id, count = database.execute(query).fetchone()
        left = database.execute("SELECT count(*) FROM inputs WHERE call_id = ?", (call_id,)).fetchone()
    assert left == (0,)
    return count


def test_every_input_of_a_map_has_one_output_whatever_is_killed_meanwhile(aeolian, tmp_path):
    killed_map(aeolian, tmp_path, count=1500, num_kills=8, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_input_of_a_map_of_ten_thousand_has_one_output_whatever_is_killed_meanwhile(aeolian, tmp_path):
    killed_map(aeolian, tmp_path, count=10_000, num_kills=40, seed=2)


# ---- everything at once -------------------------------------------------------------------------------------

KEPT = """
    import time

    import modal

    app = modal.App("kept")

    @app.function(max_containers=2, retries=0)
    def later(x):
        time.sleep(0.5)
        return x + 100

    @app.function()
    def triple(x):
        return 3 * x
"""

SPAWN = """
    import modal

    later = modal.Function.from_name("kept", "later")
    calls = [later.spawn(x) for x in range(12)]
    print("first", calls[0].get())
    print(*(call.object_id for call in calls), flush=True)
"""

COLLECT = """
    import sys

    import modal

    calls = [modal.FunctionCall.from_id(call_id) for call_id in sys.argv[1:]]
    assert [call.get(timeout=120) for call in calls] == [x + 100 for x in range(12)]
    assert modal.Function.from_name("kept", "triple").remote(14) == 42
    print("all is well")
"""


def test_after_the_death_of_everything_spawned_calls_go_on_where_they_were(aeolian, tmp_path):
    aeolian.deploy(KEPT, tmp_path)
    call_ids = aeolian.python(SPAWN, tmp_path, name="spawn.py").splitlines()[-1].split()
    assert len(call_ids) == 12
    killed = kill_everything(aeolian)
    eventually(lambda: [process for process in killed if process.is_running()], "these were killed, and live")
    aeolian.start()
    assert "kept" in aeolian.modal("app", "list")
    (tmp_path / "collect.py").write_text(textwrap.dedent(COLLECT))
    assert "all is well" in aeolian.run(sys.executable, "collect.py", *call_ids, cwd=tmp_path)
    aeolian.modal("app", "stop", "kept", "--yes")
    eventually(lambda: container_mounts(aeolian), "these mounts belong to no container any more")


def container_mounts(aeolian) -> list[str]:
    """Of containers that somebody has asked for: those that are started ahead stay."""
    lines = [line for line in left_of(aeolian.data_dir) if isinstance(line, str)]
    return [line for line in lines if "/containers/" in line and "/containers/standby-" not in line]


def test_when_the_supervisor_is_killed_nothing_stays_and_a_new_one_starts(aeolian, tmp_path):
    aeolian.deploy(KEPT, tmp_path)
    assert aeolian.python(CALL, tmp_path, name="call.py") == "45\n"
    below = psutil.Process(aeolian.pid).children(recursive=True)
    assert len(below) > 3
    os.kill(aeolian.pid, signal.SIGKILL)
    aeolian.wait()
    eventually(lambda: [process for process in below if process.is_running()], "these outlived their supervisor")
    eventually(lambda: left_of(aeolian.data_dir), "this outlived the supervisor")
    aeolian.start()
    assert aeolian.python(CALL, tmp_path, name="call.py") == "45\n"
    aeolian.modal("app", "stop", "kept", "--yes")


CALL = """
    import modal

    print(modal.Function.from_name("kept", "triple").remote(15))
"""


# ---- the server, or the worker, in the middle of something --------------------------------------------------

BUSY = """
    import hashlib
    import sys
    import time

    import modal

    app = modal.App("busy")
    runs = modal.Dict.from_name("busy-runs", create_if_missing=True)

    @app.function()
    def count(n):
        for x in range(n):
            time.sleep(0.02)
            yield x

    @app.function(retries=0, timeout=120)
    def slow(seconds):
        runs["slow"] = runs.get("slow", 0) + 1
        time.sleep(seconds)
        return "done"

    @app.function()
    def say(n):
        for x in range(n):
            print(f"line {x} of the log")
            if x % 50 == 0:
                time.sleep(0.02)

    @app.function()
    def digest(data):
        return hashlib.sha256(data).hexdigest()

    def step(text):
        print(f"now: {text}", flush=True)

    @app.local_entrypoint()
    def main():
        runs["slow"] = 0
        step("generator")
        assert list(count.remote_gen(150)) == list(range(150))
        step("remote")
        assert slow.remote(4) == "done"
        assert runs["slow"] == 1
        step("worker")
        assert slow.remote(4) == "done"
        assert runs["slow"] == 3
        step("logs")
        say.remote(2000)
        step("blobs")
        data = bytes(range(256)) * (1 << 17)
        for _ in range(3):
            assert digest.remote(data) == hashlib.sha256(data).hexdigest()
        step("volume")
        volume = modal.Volume.from_name("busy-volume", create_if_missing=True, version=2)
        with volume.batch_upload(force=True) as batch:
            for number in range(6):
                batch.put_file(__import__("io").BytesIO(bytes([number]) + data), f"/{number}.bin")
        for number in range(6):
            assert b"".join(volume.read_file(f"{number}.bin")) == bytes([number]) + data
        step("end")
"""


def test_whatever_a_client_is_doing_a_killed_server_only_makes_it_wait(aeolian, tmp_path):
    (tmp_path / "busy.py").write_text(textwrap.dedent(BUSY))
    with client(aeolian, sys.executable, "-m", "modal", "run", "busy.py", cwd=tmp_path) as running:
        for step, part, after_s in (
            ("generator", "server", 0.5),
            ("remote", "server", 1.0),
            ("worker", "worker", 1.5),
            ("logs", "server", 0.5),
            ("blobs", "server", 0.3),
            ("volume", "server", 0.3),
        ):
            running.wait_for(f"now: {step}$")
            time.sleep(after_s)
            kill(aeolian, part)
        output = running.end(240)
    assert "now: end" in output
    assert re.findall(r"line (\d+) of the log", output) == [str(x) for x in range(2000)]


def test_a_deployment_survives_a_killed_server_wherever_it_is(aeolian, tmp_path):
    for number, after_s in enumerate((0.4, 0.8, 1.2), 1):
        numbered = textwrap.dedent(KEPT) + f"\n\n@app.function()\ndef number():\n    return {number}\n"
        (tmp_path / "kept.py").write_text(numbered)
        with client(aeolian, sys.executable, "-m", "modal", "deploy", "kept.py", cwd=tmp_path) as deploying:
            time.sleep(after_s)
            kill(aeolian, "server")
            deploying.end()
    history = aeolian.modal_json("app", "history", "kept")
    assert [entry["version"] for entry in history] == ["v3", "v2", "v1"]
    source = "import modal; print(modal.Function.from_name('kept', 'number').remote())"
    assert aeolian.python(source, tmp_path, name="number.py") == "3\n"
    aeolian.modal("app", "stop", "kept", "--yes")
