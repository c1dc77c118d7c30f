"""What only the native runtime promises: isolation, limits, and that nothing of it outlives its worker."""

import asyncio
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from starting import Place, open_place

from aeolian.domain.containers import Resources
from aeolian.domain.errors import FailedPrecondition
from aeolian.worker.cgroups import CgroupKind, Cgroups
from aeolian.worker.hooks.base import Bind
from aeolian.worker.runtimes import native as native_module
from aeolian.worker.runtimes.native import NativeRuntime, make_folder_inside
from aeolian.worker.runtimes.oci_spec import CAPABILITIES
from aeolian.worker.runtimes.seccomp import seccomp_profile

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
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
os.mkdir("/mnt")
print(json.dumps({
    "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "name of 1": open("/proc/1/cmdline").read().rstrip("\\0"),
    "files of 1": opened("/proc/1/root/etc/passwd"),
    "environment of 1": opened("/proc/1/environ"),
    "devices": sorted(os.listdir("/dev")),
    "top": sorted(os.listdir("/")),
    "mount": tried(libc.mount, b"none", b"/mnt", b"tmpfs", 0, None),
    "bind": tried(libc.mount, b"/etc", b"/mnt", None, 4096, None),
    "remount": tried(libc.mount, b"none", b"/proc/sys", None, 4096 | 32, None),
    "unmount": tried(libc.umount2, b"/proc/sys", 2),
    "namespace": tried(libc.unshare, 0x10000000),
    "clone": tried(libc.syscall, 56, 0x10000000 | 17, 0, 0, 0, 0) if os.uname().machine == "x86_64" else "",
    "node": tried(libc.mknod, b"/mnt/disk", 0o60600, 0xFE00),
    "sysctl": opened("/proc/sys/kernel/hostname", "w"),
    "sysrq": opened("/proc/sysrq-trigger", "w"),
    "sys is read-only": bool(os.statvfs("/sys").f_flag & os.ST_RDONLY),
    "memory": not os.path.exists("/proc/kcore") or os.stat("/proc/kcore").st_rdev == os.stat("/dev/null").st_rdev,
    "raw socket": raw_socket(),
    "hostname": socket.gethostname(),
    "own address": socket.gethostbyname(socket.gethostname()),
    "no new privileges": status["NoNewPrivs"],
    "seccomp": status["Seccomp"],
    "capabilities": [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")],
}))
"""
KEPT_CAPABILITIES = 0x800405FB


async def probed(native, **spec) -> dict:
    ended = await native.run("python", "-c", PROBE, **spec)
    assert ended.status.exit_code == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("number", [1, 2])
async def test_a_container_sees_and_reaches_nothing_of_the_host(native, number):
    """The second container's seccomp filter is the one that was compiled for the first."""
    for _ in range(number):
        found = await probed(native)
    assert found["processes"] == [1, 2]
    assert found["name of 1"] == "init"
    assert {found["files of 1"], found["environment of 1"]} == {"Permission denied"}
    assert set(found["devices"]) <= {
        "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
        "urandom", "zero", "console",
    }  # fmt: skip
    assert set(found["top"]) == {
        "__modal", "bin", "dev", "etc", "lib", "lib64", "mnt", "proc", "root", "sys", "tmp", "usr",
    } | ({"lib32", "libx32"} & set(found["top"]))  # fmt: skip
    for what in ("mount", "bind", "remount", "unmount", "namespace", "node", "raw socket"):
        assert found[what] == "Operation not permitted", what
    assert found["clone"] in ("Operation not permitted", "Function not implemented", "")
    assert found["sysctl"] == "Read-only file system"
    assert found["sysrq"] in ("Read-only file system", "No such file or directory")
    assert found["sys is read-only"]
    assert found["memory"], "the host's memory is hidden by /dev/null"
    assert found["hostname"].startswith("ta-") and found["own address"] == "127.0.1.1"
    assert (found["no new privileges"], found["seccomp"]) == ("1", "2")
    assert found["capabilities"] == [KEPT_CAPABILITIES] * 3 + [0, 0]


async def test_keys_logs_and_groups_of_the_host_are_out_of_reach(native):
    code = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def tried(path, *flags):\n"
        "  try: return os.read(os.open(path, *flags), 10)\n"
        "  except OSError as error: return error.strerror\n"
        "print([name for name in os.listdir('/proc/self/fd') if int(name) > 3])\n"
        "print(libc.klogctl(3, ctypes.create_string_buffer(100), 100), ctypes.get_errno())\n"
        "print(tried('/proc/kmsg', os.O_RDONLY | os.O_NONBLOCK), tried('/proc/keys', os.O_RDONLY))\n"
        "print(os.listdir('/sys/fs/cgroup'), [line.split(':')[2] for line in open('/proc/self/cgroup').read().split()])"
    )
    ended = await native.run("python", "-c", code)
    descriptors, log, files, groups = ended.stdout.splitlines()
    assert log == "-1 1", "Operation not permitted"
    assert "Operation not permitted" in files and files.endswith("b''"), files
    assert descriptors == "[]"
    assert "aeolian" not in groups, groups


async def test_without_a_profile_of_the_distribution_aeolians_own_refuses_the_same(tmp_path, small_rootfs, monkeypatch):
    own = seccomp_profile(CAPABILITIES, tmp_path / "none")
    monkeypatch.setattr(native_module, "seccomp_profile", lambda capabilities: own)
    async with open_place("native", tmp_path, small_rootfs) as native:
        for _ in range(2):
            found = await probed(native)
    for what in ("mount", "bind", "remount", "unmount", "namespace", "clone", "node", "raw socket"):
        assert found[what] in ("Operation not permitted", ""), what
    assert found["seccomp"] == "2"


async def test_threads_processes_and_pools_work_under_the_filter(native):
    code = (
        "import concurrent.futures as f, multiprocessing as m, subprocess, threading\n"
        "if __name__ == '__main__':\n"
        "  with f.ThreadPoolExecutor(4) as pool: print(sum(pool.map(int, '1234')))\n"
        "  with m.get_context('fork').Pool(2) as pool: print(pool.map(abs, [-1, -2]))\n"
        "  print(subprocess.run(['sh', '-c', 'echo shell'], capture_output=True, text=True).stdout.strip())"
    )
    ended = await native.run("python", "-c", code)
    assert ended.stdout.splitlines() == ["10", "[1, 2]", "shell"], ended.stderr


async def test_limits_are_in_the_files_of_the_cgroup(native):
    resources = Resources(milli_cpu=2000, milli_cpu_max=1500, memory_mb_max=200)
    started = await native.start("sh", "-c", "echo ready; exec sleep 600", resources=resources)
    assert await started.line() == "ready"
    group = started.start.cgroup.strip("/")
    root = Path("/sys/fs/cgroup")
    if Cgroups().kind is CgroupKind.V2:
        assert (root / group / "memory.max").read_text() == f"{200 << 20}\n"
        assert (root / group / "cpu.max").read_text() == "150000 100000\n"
        assert int((root / group / "pids.max").read_text()) > 1000
    else:
        assert (root / "memory" / group / "memory.limit_in_bytes").read_text() == f"{200 << 20}\n"
        assert (root / "cpu" / group / "cpu.cfs_quota_us").read_text() == "150000\n"
        assert (root / "cpu" / group / "cpu.shares").read_text() == "2048\n"
        assert int((root / "pids" / group / "pids.max").read_text()) > 1000
    assert started.running.pid in Cgroups().process_ids(group)
    started.running.kill()
    await started.ended()


async def test_nothing_is_left_below_the_empty_hierarchy_of_a_hybrid_host(native):
    if Cgroups().kind is not CgroupKind.HYBRID:
        pytest.skip(f"this host's cgroups are not hybrid but {Cgroups().kind}")
    await native.run("sh", "-c", "true")
    code = (
        "import os\nfrom aeolian.worker.cgroups import UNIFIED\nfrom aeolian.worker.runtimes import view\n"
        "from aeolian.worker import mounting\nview.enter_namespaces(False)\nmounting.unmount(UNIFIED, detach=True)\n"
        "print(*os.listdir(UNIFIED))"
    )
    run = functools.partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seen = (await asyncio.to_thread(run)).stdout.split()
    assert native.runtime.cgroup_of("").strip("/") not in seen


async def test_a_container_that_takes_too_much_memory_is_said_to_have_been_killed_for_it(native):
    code = "held = []\nwhile True: held.append(bytearray(b'x') * (1 << 20))"
    ended = await native.run("python", "-c", code, resources=Resources(memory_mb_max=64))
    assert (ended.status.exit_code, ended.status.oom_killed) == (-signal.SIGKILL, True)


async def test_files_in_memory_count_against_the_limit(native):
    code = "f = open('/dev/shm/big', 'wb')\nfor _ in range(256): f.write(b'x' * (1 << 20))"
    ended = await native.run("python", "-c", code, resources=Resources(memory_mb_max=64))
    assert ended.status.oom_killed


async def test_a_command_that_the_image_lacks_is_said_by_its_name(native):
    with pytest.raises(FailedPrecondition, match="no-such-command"):
        await native.run("no-such-command")
    assert (await native.run("sh", "-c", "echo on")).stdout == "on\n"


async def test_without_network_there_is_only_loopback_and_the_socket_of_the_worker(native):
    listener = socket.create_server(("127.0.0.1", 0))
    start = native.prepared(
        "python", "-c",
        "import os, socket\n"
        "worker = socket.socket(socket.AF_UNIX); worker.connect('/__modal/worker.sock'); worker.send(b'hello')\n"
        "lines = open('/proc/net/dev').read().splitlines()[2:]\n"
        "print([line.split(':')[0].strip() for line in lines], os.path.exists('/etc/resolv.conf'))\n"
        "own = socket.create_server(('127.0.0.1', 0)); socket.create_connection(own.getsockname()); print('loopback')\n"
        f"print(socket.socket().connect_ex(('127.0.0.1', {listener.getsockname()[1]})) != 0)",
        block_network=True,
    )  # fmt: skip
    start.socket_path.unlink()
    with listener, socket.socket(socket.AF_UNIX) as worker:
        worker.bind(str(start.socket_path))
        worker.listen()
        ended = await (await native.start(prepared=start)).ended()
        connection, _ = worker.accept()
        with connection:
            assert connection.recv(10) == b"hello"
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("['lo'") and "eth" not in lines[0], ended.stderr
    assert lines[1:] == ["loopback", "True"]


async def test_with_network_a_container_reaches_the_hosts_loopback_and_knows_its_names(native):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = (
            "import os, socket, ssl\n"
            f"print(socket.socket().connect_ex(('127.0.0.1', {listener.getsockname()[1]})))\n"
            "print(socket.gethostbyname('localhost'), len(ssl.create_default_context().get_ca_certs()) > 0)"
        )
        ended = await native.run("python", "-c", code)
    assert ended.stdout.splitlines()[0] == "0", ended.stderr
    assert ended.stdout.splitlines()[1].startswith("127.0.0.1")
    if Path("/etc/ssl/certs/ca-certificates.crt").exists():
        assert ended.stdout.endswith("True\n"), "the small image has no certificates of its own"


async def test_open_files_are_limited_to_what_the_host_can_give(native):
    code = "import resource as r; print(*r.getrlimit(r.RLIMIT_NOFILE), *r.getrlimit(r.RLIMIT_CORE))"
    soft, hard, *core = map(int, (await native.run("python", "-c", code)).stdout.split())
    assert 256 < soft <= hard <= 65_536
    assert core == [0, 0]


async def test_an_image_saved_from_a_container_holds_what_it_wrote_and_no_places_to_mount_on(native, tmp_path):
    (tmp_path / "shared").mkdir()
    start = native.prepared("sh", "-c", "echo new > /root/new; echo x > /etc/small; mkdir /empty", save_image_as="im-2")
    upper = start.folder / "upper"
    kept = tmp_path / "kept"
    start.binds.append(Bind(tmp_path / "shared", "/mounted/here"))
    started = await native.start(prepared=start)
    await started.running.wait()
    await started.running.release()
    os.rename(upper, kept)
    upper.mkdir()
    assert {str(path.relative_to(kept)) for path in kept.rglob("*")} == {
        "root",
        "root/new",
        "etc",
        "etc/small",
        "empty",
    }
    await started.ended()


async def test_when_the_keeper_dies_its_containers_die_and_the_next_one_starts(native):
    started = await native.start("sh", "-c", "echo ready; exec sleep 600")
    assert await started.line() == "ready"
    keeper = await native.runtime.keeper.get()
    os.kill(keeper.pid, signal.SIGKILL)
    assert (await started.ended()).status.exit_code == -signal.SIGKILL
    assert (await native.run("sh", "-c", "echo again")).stdout == "again\n"


WORKER = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from starting import Place, open_place
from aeolian.worker.runtimes.native import NativeRuntime

async def main():
    place = Place(Path(sys.argv[1]), None)
    await place.open(NativeRuntime)
    for _ in range(3):
        started = await place.start("python", "-c",
            "import os, time\\nif os.fork() == 0: os.setsid()\\nprint('ready', flush=True); time.sleep(600)")
        await started.line()
    keeper = await place.runtime.keeper.get()
    print(keeper.pid, *(started.running.pid for started in place.started), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("with_keeper", [False, True])
async def test_a_killed_worker_leaves_nothing(native, tmp_path, with_keeper):
    """Its keeper ends the containers; when that is killed, too, the kernel does, and the next worker clears up."""
    data_dir = tmp_path / "other"
    place = Place(data_dir, tmp_path / "layers/base")
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, str(data_dir), str(Path(__file__).parent), stdout=asyncio.subprocess.PIPE
    )
    assert worker.stdout is not None
    keeper, *mains = map(int, (await worker.stdout.readline()).split())
    watched = [os.pidfd_open(pid) for pid in (keeper, *mains)]
    runtime = NativeRuntime(data_dir, place.images, place.sdk)
    group = runtime.cgroup_of("").strip("/")
    assert len(Cgroups().process_ids(group)) == 6
    assert str(data_dir) in Path("/proc/self/mountinfo").read_text()
    if with_keeper:
        os.kill(keeper, signal.SIGKILL)
    worker.kill()
    await worker.wait()
    for descriptor in watched:
        await has_ended(descriptor)
    if with_keeper:
        await runtime.open()
        await runtime.close()
    assert not Cgroups().process_ids(group)
    assert not [folder for folder in Cgroups().hierarchies() if (folder / group).exists()]
    assert str(data_dir) not in Path("/proc/self/mountinfo").read_text()
    assert not (data_dir / "runtime/native/crun").exists()


async def has_ended(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(descriptor, ended.set_result, None)
    await ended
    loop.remove_reader(descriptor)
    os.close(descriptor)


def test_a_folder_is_made_inside_a_root_file_system_and_never_where_its_links_lead(tmp_path):
    rootfs, host = tmp_path / "rootfs", tmp_path / "host"
    (rootfs / "srv").mkdir(parents=True)
    host.mkdir()
    (rootfs / "link").symlink_to(host)
    make_folder_inside(rootfs, "/srv/a/b")
    make_folder_inside(rootfs, "/link/a/b")
    assert (rootfs / "srv/a/b").is_dir()
    assert list(host.iterdir()) == []


async def test_a_container_that_is_cancelled_while_it_starts_leaves_nothing(native):
    for pause_s in (0, 0.002, 0.01, 0.03):
        start = native.prepared("sh", "-c", "sleep 600")
        await native.apply(start)
        starting = asyncio.create_task(native.runtime.start(start))
        await asyncio.sleep(pause_s)
        if starting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await starting
        else:
            container = starting.result()
            container.kill()
            await container.wait()
            await container.release()
        group = start.cgroup
        await native.undo(start)
        assert not Cgroups().process_ids(group)
        assert not [folder for folder in Cgroups().hierarchies() if (folder / group.strip("/")).exists()]
    assert not list(native.data_dir.glob("runtime/native/crun/*"))  # no folder where no crun came that far
