import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from aeolian.cli import supervisor as module
from aeolian.cli.supervisor import ChildRecord, ChildSpec, GaveUp, Supervisor, end_leftovers

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def python(name: str, code: str, **options) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-S", "-c", code), **options)


class Watch:
    """A supervisor under test: what it and its processes said, as events."""

    def __init__(self, specs: list[ChildSpec], folder: Path):
        self.lines: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.said: list[str] = []
        self.stop = asyncio.Event()
        self.supervisor = Supervisor(
            specs,
            folder / "processes.json",
            on_line=lambda name, text: self.lines.put_nowait((name, text)),
            say=self.said.append,
        )

    async def line(self) -> tuple[str, str]:
        return await asyncio.wait_for(self.lines.get(), 10)


@contextlib.asynccontextmanager
async def running(specs: list[ChildSpec], folder: Path):
    watch = Watch(specs, folder)
    task = asyncio.ensure_future(watch.supervisor.run(watch.stop))
    try:
        yield watch
    finally:
        watch.stop.set()
        watch.supervisor.kill_now.set()
        await asyncio.wait_for(task, 10)


async def test_a_killed_process_is_started_again_at_once(tmp_path):
    async with running([python("server", SLEEP)], tmp_path) as watch:
        assert await watch.line() == ("server", "up")
        first = watch.supervisor.pids["server"]
        started = asyncio.get_running_loop().time()
        os.kill(first, signal.SIGKILL)
        assert await watch.line() == ("server", "up")
        assert asyncio.get_running_loop().time() - started < 2
        assert watch.supervisor.pids["server"] != first
        assert watch.said == ["server died of SIGKILL; starting it again now"]


SPARED = (
    "import os, sys, time;"
    "'--wait' in sys.argv and (sys.stdin.readline() or sys.exit());"
    "print(os.getpid(), flush=True); time.sleep(60)"
)


def spare_of(folder: Path) -> int | None:
    records = msgspec.json.decode((folder / "processes.json").read_bytes(), type=list[ChildRecord])
    return next((record.pid for record in records if record.name == "server (spare)"), None)


async def the_spare(folder: Path) -> int:
    async with asyncio.timeout(10):
        while (pid := spare_of(folder)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return pid


async def test_a_spare_takes_the_place_of_what_died_and_gets_a_spare_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SPARE_AFTER_S", 0.0)
    async with running([python("server", SPARED, has_spare=True)], tmp_path) as watch:
        await watch.line()
        spare = await the_spare(tmp_path)
        os.kill(watch.supervisor.pids["server"], signal.SIGKILL)
        assert await watch.line() == ("server", str(spare))
        assert watch.supervisor.pids["server"] == spare
        assert await the_spare(tmp_path) != spare
        pids = [spare, await the_spare(tmp_path)]
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_without_its_spare_it_is_started_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SPARE_AFTER_S", 0.0)
    async with running([python("server", SPARED, has_spare=True)], tmp_path) as watch:
        await watch.line()
        spare = await the_spare(tmp_path)
        os.kill(spare, signal.SIGKILL)
        async with asyncio.timeout(10):
            while psutil.pid_exists(spare):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        os.kill(watch.supervisor.pids["server"], signal.SIGKILL)
        _, pid = await watch.line()
        assert int(pid) not in (spare, 0)


async def test_processes_run_although_they_cannot_be_written_down(tmp_path):
    async with running([python("server", SLEEP)], tmp_path / "gone") as watch:
        assert await watch.line() == ("server", "up")
        assert "cannot be written down" in watch.said[0]


async def test_processes_are_stopped_in_reverse_order_and_none_is_left(tmp_path):
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit()));"
        "print('up', flush=True); time.sleep(60)"
    )
    async with running([python("front", code), python("worker", code)], tmp_path) as watch:
        await watch.line()
        await watch.line()
        pids = list(watch.supervisor.pids.values())
        watch.stop.set()
        assert [await watch.line(), await watch.line()] == [("worker", "bye"), ("front", "bye")]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not (tmp_path / "processes.json").exists()


async def test_what_ignores_sigterm_is_killed_with_what_it_started(tmp_path):
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]); {STUBBORN}"
    async with running([python("worker", code, stop_s=0.3)], tmp_path) as watch:
        await watch.line()
        await watch.line()
        (pid,) = watch.supervisor.pids.values()
        (grandchild,) = psutil.Process(pid).children()
        watch.stop.set()
    assert not psutil.pid_exists(pid)
    psutil.wait_procs([grandchild], timeout=5)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


async def test_a_second_stop_ends_the_drain(tmp_path):
    async with running([python("worker", STUBBORN, stop_s=60)], tmp_path) as watch:
        await watch.line()
        watch.stop.set()
        await asyncio.sleep(0.1)
        watch.supervisor.kill_now.set()
        async with asyncio.timeout(5):
            while watch.supervisor.pids:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_process_that_never_starts_ends_everything_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_S", (0.0,))
    watch = Watch([python("front", SLEEP), python("server", "import sys; sys.exit('no database')")], tmp_path)
    with pytest.raises(GaveUp, match=r"server does not start: it exited with status 1[\s\S]*no database"):
        await asyncio.wait_for(watch.supervisor.run(watch.stop), 20)
    assert watch.supervisor.pids == {}


async def test_a_process_that_says_it_cannot_work_is_not_tried_again(tmp_path):
    watch = Watch([python("server", "import os; os._exit(78)")], tmp_path)
    with pytest.raises(GaveUp):
        await asyncio.wait_for(watch.supervisor.run(watch.stop), 10)
    assert watch.said == []


SUPERVISE = """
import asyncio, sys
from pathlib import Path
from aeolian.cli.supervisor import ChildSpec, Supervisor
child = ChildSpec("child", (sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(60)"))
async def main():
    supervisor = Supervisor([child], Path(sys.argv[1]), on_line=lambda *_: print(supervisor.pids["child"], flush=True),
        say=print)
    await supervisor.run(asyncio.Event())
asyncio.run(main())
"""


def test_processes_die_with_a_killed_supervisor(tmp_path):
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, str(tmp_path / "processes.json")], stdout=subprocess.PIPE, text=True
    )
    try:
        child = psutil.Process(int(supervisor.stdout.readline()))
        supervisor.kill()
        gone, _alive = psutil.wait_procs([child], timeout=5)
        assert gone or child.status() == psutil.STATUS_ZOMBIE
    finally:
        supervisor.kill()
        supervisor.wait()
        supervisor.stdout.close()


def test_leftovers_of_an_earlier_run_are_ended_but_no_stranger_with_a_reused_pid(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEFTOVER_GRACE_S", 0.2)
    leftover, stranger = (
        subprocess.Popen([sys.executable, "-S", "-c", SLEEP], stdout=subprocess.DEVNULL, start_new_session=True)
        for _ in range(2)
    )
    try:
        record = tmp_path / "processes.json"
        record.write_bytes(
            msgspec.json.encode(
                [
                    ChildRecord("worker", leftover.pid, psutil.Process(leftover.pid).create_time()),
                    ChildRecord("server", stranger.pid, 1.0),
                ]
            )
        )
        said: list[str] = []
        end_leftovers(record, said.append)
        leftover.wait(5)
        assert stranger.poll() is None
        assert said == [f"ending process {leftover.pid}, left over from an earlier run"]
        assert not record.exists()
    finally:
        for process in (leftover, stranger):
            process.kill()
            process.wait()
