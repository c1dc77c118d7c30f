"""What only the gvisor runtime promises: a kernel of its own, limits, and that nothing of it outlives its worker."""

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from starting import Place

from aeolian.domain.containers import Resources
from aeolian.domain.errors import FailedPrecondition
from aeolian.worker.cgroups import CgroupKind, Cgroups
from aeolian.worker.hooks.base import Bind
from aeolian.worker.runtimes.gvisor import OWN_MEMORY_MB, GvisorRuntime, with_own_memory

PROBE = """
import ctypes, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def tried(call, *args):
    return "done" if call(*args) >= 0 else os.strerror(ctypes.get_errno())
def opened(path, mode="r"):
    try:
        open(path, mode).close()
        return "done"
    except OSError as error:
        return error.strerror
def raw_socket():
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close()
        return "done"
    except OSError as error:
        return error.strerror
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
os.mkdir("/mnt")
print(json.dumps({
    "kernel": open("/proc/version").read(),
    "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "environment of 1": open("/proc/1/environ").read(),
    "devices": sorted(os.listdir("/dev")),
    "mounts": [line.split()[2] for line in open("/proc/mounts")] + open("/proc/mounts").read().split(),
    "mount": tried(libc.mount, b"none", b"/mnt", b"tmpfs", 0, None),
    "node": tried(libc.mknod, b"/mnt/disk", 0o60600, 0xFE00),
    "cgroups": open("/proc/self/cgroup").read(),
    "module": opened("/dev/mem"),
    "kernel memory": opened("/proc/kcore"),
    "raw socket": raw_socket(),
    "hostname": socket.gethostname(),
    "capabilities": [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh")],
}))
"""
KEPT_CAPABILITIES = 0x800405FB


async def test_a_container_sees_and_reaches_nothing_of_the_host(gvisor, monkeypatch):
    monkeypatch.setenv("OF_THE_WORKER", "secret")
    ended = await gvisor.run("python", "-c", PROBE)
    assert ended.status.exit_code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert os.uname().release not in found["kernel"], "it is gVisor's, not the host's"
    assert found["processes"] == [1, 2]
    assert "OF_THE_WORKER" not in found["environment of 1"]
    assert set(found["devices"]) <= {
        "fd", "full", "fuse", "net", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
        "urandom", "zero",
    }  # fmt: skip
    assert not [word for word in found["mounts"] if str(gvisor.data_dir) in word]
    assert found["mount"] == found["node"] == "Operation not permitted"
    assert "aeolian" not in found["cgroups"]
    assert found["module"] == found["kernel memory"] == "No such file or directory"
    assert found["raw socket"] == "Operation not permitted"
    assert found["hostname"].startswith("ta-")
    assert found["capabilities"] == [KEPT_CAPABILITIES] * 3 + [0]


async def test_what_is_shown_read_only_cannot_be_emptied_either(gvisor, tmp_path):
    """gVisor itself lets O_TRUNC pass: the kernel refuses it."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/file").write_text("whole\n")
    code = (
        "import os\n"
        "for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT):\n"
        "  try: os.open('/shared/file', flags | os.O_TRUNC); print('opened')\n"
        "  except OSError as error: print(error.strerror)"
    )
    start = gvisor.prepared("python", "-c", code)
    start.binds.append(Bind(tmp_path / "shared", "/shared"))
    ended = await (await gvisor.start(prepared=start)).ended()
    assert ended.stdout.splitlines() == ["Read-only file system"] * 4, ended.stderr
    assert (tmp_path / "shared/file").read_text() == "whole\n"


async def test_limits_are_in_the_files_of_the_cgroup_and_gvisors_own_memory_comes_on_top(gvisor):
    resources = Resources(milli_cpu=2000, milli_cpu_max=1500, memory_mb_max=200)
    started = await gvisor.start("sh", "-c", "echo ready; exec sleep 600", resources=resources)
    assert await started.line() == "ready"
    group, root = started.start.cgroup.strip("/"), Path("/sys/fs/cgroup")
    max_bytes = (200 + OWN_MEMORY_MB) << 20
    if Cgroups().kind is CgroupKind.V2:
        assert (root / group / "memory.max").read_text() == f"{max_bytes}\n"
        assert (root / group / "cpu.max").read_text() == "150000 100000\n"
        assert int((root / group / "pids.max").read_text()) > 1000
    else:
        assert (root / "memory" / group / "memory.limit_in_bytes").read_text() == f"{max_bytes}\n"
        assert (root / "cpu" / group / "cpu.cfs_quota_us").read_text() == "150000\n"
        assert (root / "cpu" / group / "cpu.shares").read_text() == "2048\n"
        assert int((root / "pids" / group / "pids.max").read_text()) > 1000
    assert len(Cgroups().process_ids(group)) > 2, "the sandbox is in it"
    started.running.kill()
    await started.ended()


def test_without_a_limit_of_memory_there_is_none():
    assert with_own_memory(Resources()) == Resources()


async def test_a_container_that_takes_too_much_memory_is_said_to_have_been_killed_for_it(gvisor):
    code = "held = []\nwhile True: held.append(bytearray(b'x') * (1 << 20))"
    ended = await gvisor.run("python", "-c", code, resources=Resources(memory_mb_max=64))
    assert (ended.status.exit_code, ended.status.oom_killed) == (-signal.SIGKILL, True)


async def test_processes_without_end_end_with_their_container(gvisor):
    """They are threads of the sandbox: the limit of processes is for all of it."""
    code = (
        "import os, time\n"
        "print('ready', flush=True)\n"
        "for _ in range(200):\n"
        "  if os.fork() == 0: time.sleep(600)\n"
        "print('forked', flush=True); time.sleep(600)"
    )
    started = await gvisor.start("python", "-c", code)
    assert [await started.line(), await started.line()] == ["ready", "forked"]
    started.running.kill()
    assert (await started.ended()).status.exit_code == -signal.SIGKILL


async def test_a_gpu_is_refused_with_what_to_do(gvisor):
    with pytest.raises(FailedPrecondition, match="no GPU: use the native one"):
        await gvisor.run("true", resources=Resources(gpu_count=1))


async def test_a_command_that_the_image_lacks_is_said_by_its_name(gvisor):
    ended = await gvisor.run("no-such-command")
    assert (ended.status.exit_code, ended.stderr) == (127, "cannot run no-such-command: No such file or directory\n")


async def test_an_image_without_python_has_no_other_process_than_its_command(gvisor):
    start = gvisor.prepared("sh", "-c", "cat /proc/1/cmdline; exit 3")
    await gvisor.apply(start)
    start.python = ""
    running = await gvisor.runtime.start(start)
    try:
        assert (await running.stdout.read()).startswith(b"sh\0-c\0cat")
        assert (await running.wait()).exit_code == 3
    finally:
        await running.release()
        await gvisor.undo(start)


async def test_what_gvisor_could_not_run_is_said(gvisor):
    start = gvisor.prepared("no-such-command")
    await gvisor.apply(start)
    start.python = ""
    running = await gvisor.runtime.start(start)
    try:
        status = await running.wait()
        assert status.exit_code == 127 and "no-such-command" in status.reason
    finally:
        await running.release()
        await gvisor.undo(start)


async def test_without_network_there_is_only_loopback_and_the_socket_of_the_worker(gvisor):
    listener = socket.create_server(("127.0.0.1", 0))
    start = gvisor.prepared(
        "python", "-c",
        "import os, socket\n"
        "worker = socket.socket(socket.AF_UNIX); worker.connect('/__modal/worker.sock'); worker.send(b'hello')\n"
        "lines = open('/proc/net/dev').read().splitlines()[2:]\n"
        "print([line.split(':')[0].strip() for line in lines])\n"
        f"print(socket.socket().connect_ex(('127.0.0.1', {listener.getsockname()[1]})) != 0)",
        block_network=True,
    )  # fmt: skip
    start.socket_path.unlink()
    with listener, socket.socket(socket.AF_UNIX) as worker:
        worker.bind(str(start.socket_path))
        worker.listen()
        ended = await (await gvisor.start(prepared=start)).ended()
        connection, _ = worker.accept()
        with connection:
            assert connection.recv(10) == b"hello"
    interfaces, is_closed = ended.stdout.splitlines()
    assert "eth" not in interfaces and is_closed == "True", ended.stderr


async def test_a_signal_that_comes_while_a_container_starts_reaches_it(gvisor):
    started = await gvisor.start("sh", "-c", "exec sleep 600")
    started.running.signal(signal.SIGTERM)
    assert (await started.ended()).status.exit_code == -signal.SIGTERM


async def test_when_the_keeper_dies_its_containers_die_and_the_next_one_starts(gvisor):
    started = await gvisor.start("sh", "-c", "echo ready; exec sleep 600")
    assert await started.line() == "ready"
    keeper = await gvisor.runtime.keeper.get()
    os.kill(keeper.pid, signal.SIGKILL)
    assert (await started.ended()).status.exit_code == -signal.SIGKILL
    assert (await gvisor.run("sh", "-c", "echo again")).stdout == "again\n"


WORKER = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from starting import Place
from aeolian.worker.runtimes.gvisor import GvisorRuntime

async def main():
    place = Place(Path(sys.argv[1]), None)
    await place.open(GvisorRuntime)
    for _ in range(2):
        started = await place.start("python", "-c",
            "import os, time\\nif os.fork() == 0: os.setsid()\\nprint('ready', flush=True); time.sleep(600)")
        await started.line()
    keeper = await place.runtime.keeper.get()
    print(keeper.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("with_keeper", [False, True])
async def test_a_killed_worker_leaves_nothing(gvisor, tmp_path, with_keeper):
    """Its keeper ends the containers; when that is killed, too, the kernel does, and the next worker clears up."""
    data_dir = tmp_path / "other"
    place = Place(data_dir, tmp_path / "layers/base")
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, str(data_dir), str(Path(__file__).parent), stdout=asyncio.subprocess.PIPE
    )
    assert worker.stdout is not None
    keeper = int(await worker.stdout.readline())
    runtime = GvisorRuntime(data_dir, place.images, place.sdk)
    group = runtime.cgroup_of("").strip("/")
    sandboxed = Cgroups().process_ids(group)
    assert len(sandboxed) > 4
    watched = [os.pidfd_open(pid) for pid in (keeper, *sandboxed)]
    if with_keeper:
        os.kill(keeper, signal.SIGKILL)
    worker.kill()
    await worker.wait()
    for descriptor in watched:
        await has_ended(descriptor)
    if with_keeper:
        await runtime.open()
        await runtime.close()
    assert not [folder for folder in Cgroups().hierarchies() if (folder / group).exists()]
    assert str(data_dir) not in Path("/proc/self/mountinfo").read_text()


async def has_ended(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(descriptor, ended.set_result, None)
    await ended
    loop.remove_reader(descriptor)
    os.close(descriptor)
