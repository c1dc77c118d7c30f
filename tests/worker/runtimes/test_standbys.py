"""Containers that are made of standbys: the same as those that start cold, and nothing of one is another's."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest
from modal_proto import api_pb2
from starting import Ended, Place, StandbyPlace, Started
from test_native import KEPT_CAPABILITIES, PROBE, has_ended

from aeolian.domain.containers import Resources
from aeolian.domain.execs import Command
from aeolian.worker.cgroups import CgroupKind, Cgroups
from aeolian.worker.rpc import ContainerServer, ContainerService
from aeolian.worker.runtimes import standbys as standbys_module
from aeolian.worker.runtimes.native import NativeRuntime
from aeolian.worker.runtimes.standby_fit import ENTRYPOINT_ARGV
from aeolian.worker.runtimes.standbys import OOM_SCORE_ADJ
from aeolian.worker.sdk import own_version

SEEN = """
import json, os, random, sys
import modal, yaml_of_mine
print(json.dumps({
    "path": sys.path, "argv": sys.argv, "orig_argv": sys.orig_argv, "cwd": os.getcwd(), "name": __name__,
    "main": [sys.modules["__main__"].__name__, sys.modules["__main__"].__file__],
    "environment": {name: value for name, value in os.environ.items() if name != "MODAL_TASK_ID"},
    "modal": modal.__file__, "mine": yaml_of_mine.__file__, "files": sorted(os.listdir("/")),
    "stdin": os.readlink("/proc/self/fd/0"), "mask": os.umask(0o22), "flags": list(sys.flags),
    "limits": open("/proc/self/limits").read(), "oom": open("/proc/self/oom_score_adj").read(),
    "mounts": sorted(line.split()[4] + " " + line.split()[5] for line in open("/proc/self/mountinfo")),
    "seeds": [hash("seed"), random.random()], "is_from_standby": "standby_main" in open("/proc/self/cmdline").read(),
}))
"""


def given(place: Place, files: dict[str, str], **spec):
    """The SDK's entrypoint for a Function of `/root/user_module.py`, with a Mount of these files."""
    arguments = api_pb2.ContainerArguments(
        task_id="ta-1", function_id="fu-1", app_id="ap-1",
        function_def=api_pb2.Function(module_name="user_module", function_name="f", app_name="a"),
    )  # fmt: skip
    env = {"MODAL_IS_REMOTE": "1", **spec.pop("env", {})}
    start = place.prepared(
        *ENTRYPOINT_ARGV, arguments=arguments.SerializeToString(), sdk_version=own_version(), env=env, **spec
    )
    layer = start.folder / "mount"
    for name, text in files.items():
        (layer / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (layer / "root" / name).write_text(text)
    start.layers = [layer]
    return start


async def run(place: Place, files: dict[str, str], **spec) -> Ended:
    """Until the user's module has been imported (`f` is not in it, so that is all)."""
    start = given(place, files, **spec)
    start.socket_path.unlink()

    async def nothing(raw: bytes, key: str) -> bytes:
        return b""

    async def beat(raw: bytes, key: str) -> bytes:
        await asyncio.sleep(3600)
        return b""

    own = {"ContainerHello": nothing, "ContainerHeartbeat": beat, "TaskResult": nothing}
    server = ContainerServer(str(start.socket_path), ContainerService("ta-1", "", None, own))  # type: ignore[arg-type]
    await server.start()
    try:
        return await (await Place.start(place, prepared=start)).ended()
    finally:
        await server.stop()


async def prepare(place: StandbyPlace) -> None:
    await place.runtime.standbys.prepare(place.prepared(*ENTRYPOINT_ARGV).spec)


MINE = {"user_module.py": SEEN, "yaml_of_mine.py": ""}


async def test_a_container_of_a_standby_sees_what_a_cold_one_sees(from_standbys):
    env = {"SECRET": "of one", "TZ": "Asia/Tokyo"}
    cold = await run(from_standbys, MINE, env=env)
    await prepare(from_standbys)
    warm = await run(from_standbys, MINE, env=env)
    of_cold, of_warm = json.loads(cold.stdout), json.loads(warm.stdout)
    assert (of_cold.pop("is_from_standby"), of_warm.pop("is_from_standby")) == (False, True)
    assert of_cold.pop("seeds") != of_warm.pop("seeds")
    for name, value in of_cold.items():
        assert of_warm[name] == value, name
    assert (warm.status, "no attribute 'f'" in warm.stderr) == (cold.status, True)
    assert cold.stderr == warm.stderr


async def test_a_standby_serves_one_container_and_the_next_one_gets_another(from_standbys):
    seeds = []
    for _ in range(2):
        await prepare(from_standbys)
        seen = json.loads((await run(from_standbys, MINE)).stdout)
        assert seen["is_from_standby"]
        seeds.append(seen["seeds"])
    assert seeds[0] != seeds[1]


async def test_containers_that_start_together_find_one_each_the_next_time(from_standbys):
    for expected in (0, 2):
        ends = await asyncio.gather(*(run(from_standbys, MINE) for _ in range(2)))
        assert sum(json.loads(ended.stdout)["is_from_standby"] for ended in ends) == expected
        await until_ready(from_standbys)


async def test_a_start_takes_a_standby_that_is_on_its_way(from_standbys, monkeypatch):
    monkeypatch.setattr(standbys_module, "MAX_WAIT_S", 60)
    preparing = asyncio.create_task(prepare(from_standbys))
    await asyncio.sleep(0)
    (standby,) = from_standbys.runtime.standbys.all()
    await standby.is_launched.wait()
    one, other = await asyncio.gather(run(from_standbys, MINE), run(from_standbys, MINE))
    assert {json.loads(ended.stdout)["is_from_standby"] for ended in (one, other)} == {True, False}
    await preparing


async def test_an_image_can_be_prepared_before_its_first_container(from_standbys):
    await from_standbys.runtime.prepare("im-small", own_version(), "2025.06")
    assert json.loads((await run(from_standbys, MINE)).stdout)["is_from_standby"]


async def test_a_start_that_finds_no_standby_is_cold_and_the_next_one_finds_one(from_standbys):
    assert not json.loads((await run(from_standbys, MINE)).stdout)["is_from_standby"]
    await until_ready(from_standbys)
    assert json.loads((await run(from_standbys, MINE)).stdout)["is_from_standby"]


@pytest.mark.parametrize(
    ("files", "env"),
    [({**MINE, "typing_extensions.py": "print('mine')"}, {}), (MINE, {"MODAL_LOGLEVEL": "ERROR"})],
)
async def test_a_container_that_a_standby_does_not_fit_starts_cold(from_standbys, files, env):
    await prepare(from_standbys)
    ended = await run(from_standbys, files, env=env)
    assert "is_from_standby" not in ended.stdout or '"is_from_standby": false' in ended.stdout
    assert ("mine\n" in ended.stdout) == ("typing_extensions.py" in files)


async def test_a_standby_knows_nothing_of_the_container_that_it_becomes(from_standbys):
    await prepare(from_standbys)
    (standby,) = from_standbys.runtime.standbys.all()
    pid = standby.container.pid
    environment = Path(f"/proc/{pid}/environ").read_text()
    assert "FROM_IMAGE=yes" in environment and "MODAL_TASK_ID" not in environment
    assert not os.path.exists(f"/proc/{pid}/root/__modal/worker.sock")
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == f"{OOM_SCORE_ADJ}\n"
    ended = await run(from_standbys, MINE, env={"SECRET": "s3cr3t"})
    assert json.loads(ended.stdout)["environment"]["SECRET"] == "s3cr3t"


async def test_a_container_of_a_standby_reaches_nothing_of_the_host(from_standbys):
    ended = await from_standbys.run("python", "-c", PROBE)
    assert ended.status.exit_code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["processes"] == [1, 2]
    assert {found["files of 1"], found["environment of 1"]} == {"Permission denied"}
    for what in ("mount", "bind", "remount", "unmount", "namespace", "node", "raw socket"):
        assert found[what] == "Operation not permitted", what
    assert found["sysctl"] == "Read-only file system"
    assert found["sys is read-only"] and found["memory"]
    assert found["hostname"].startswith("ta-") and found["own address"] == "127.0.1.1"
    assert (found["no new privileges"], found["seccomp"]) == ("1", "2")
    assert found["capabilities"] == [KEPT_CAPABILITIES] * 3 + [0, 0]


async def test_its_limits_are_set_before_it_goes_on(from_standbys):
    resources = Resources(milli_cpu=2000, milli_cpu_max=1500, memory_mb_max=200)
    started = await from_standbys.start("sh", "-c", "echo ready; exec sleep 600", resources=resources)
    group, root = started.start.cgroup.strip("/"), Path("/sys/fs/cgroup")
    assert await started.line() == "ready"
    if Cgroups().kind is CgroupKind.V2:
        assert (root / group / "memory.max").read_text() == f"{200 << 20}\n"
        assert (root / group / "cpu.max").read_text() == "150000 100000\n"
    else:
        assert (root / "memory" / group / "memory.limit_in_bytes").read_text() == f"{200 << 20}\n"
        assert (root / "cpu" / group / "cpu.cfs_quota_us").read_text() == "150000\n"
        assert (root / "cpu" / group / "cpu.shares").read_text() == "2048\n"
    assert started.running.pid in Cgroups().process_ids(group)
    started.running.kill()
    await started.ended()


async def test_a_container_of_a_standby_that_takes_too_much_memory_is_said_to_have_been_killed_for_it(from_standbys):
    code = "held = []\nwhile True: held.append(bytearray(b'x') * (1 << 20))"
    ended = await from_standbys.run("python", "-c", code, resources=Resources(memory_mb_max=96))
    assert (ended.status.exit_code, ended.status.oom_killed) == (-signal.SIGKILL, True)


async def test_a_command_can_be_run_in_it_with_its_variables_and_files(from_standbys):
    started = await from_standbys.start("sh", "-c", "echo mine > /etc/small; echo ready; sleep 600", env={"OWN": "x"})
    assert await started.line() == "ready"
    command = await started.running.exec(Command(("sh", "-c", "cat /etc/small; echo $OWN; pwd")))
    assert await command.wait() == 0
    assert os.read(command.stdout, 1000) == b"mine\nx\n/root\n"
    command.close()
    started.running.kill()
    await started.ended()


async def test_a_standby_that_dies_is_forgotten_and_the_start_is_cold(from_standbys):
    await prepare(from_standbys)
    (standby,) = from_standbys.runtime.standbys.all()
    os.kill(standby.container.pid, signal.SIGKILL)
    await standby.task
    assert not standby.start.folder.exists()
    assert not json.loads((await run(from_standbys, MINE)).stdout)["is_from_standby"]


async def test_a_standby_that_dies_while_it_is_assigned_leaves_the_start_to_go_on_cold(from_standbys):
    await prepare(from_standbys)
    (standby,) = from_standbys.runtime.standbys.all()
    start = given(from_standbys, MINE)
    await from_standbys.apply(start)
    os.kill(standby.container.pid, signal.SIGKILL)
    await standby.container.wait()
    started = Started(from_standbys, start)
    started.running = await from_standbys.runtime.start(start)
    from_standbys.started.append(started)
    assert "standby" not in start.cgroup
    started.running.kill()
    await started.ended()


async def test_a_start_that_is_given_up_ends_its_standby(from_standbys):
    await prepare(from_standbys)
    (standby,) = from_standbys.runtime.standbys.all()
    watched = os.pidfd_open(standby.container.pid)
    start = given(from_standbys, MINE)
    await from_standbys.apply(start)
    await from_standbys.undo(start)
    await has_ended(watched)
    assert not standby.start.folder.exists()


async def test_no_more_than_a_number_are_kept_and_the_least_recently_used_goes_first(from_standbys):
    standbys = from_standbys.runtime.standbys
    standbys._max = 2
    for folder in ("/a", "/b", "/c"):
        await standbys.prepare(from_standbys.prepared(*ENTRYPOINT_ARGV, cwd=folder).spec)
    assert [standby.start.cwd for standby in standbys.all()] == ["/b", "/c"]


async def test_an_image_that_is_built_again_leaves_no_standby_of_the_old_one(from_standbys):
    await prepare(from_standbys)
    (old,) = from_standbys.runtime.standbys.all()
    image = from_standbys.images.get("im-small")
    from_standbys.images.put(msgspec.structs.replace(image, env={**image.env, "NEW": "1"}))
    await prepare(from_standbys)
    (new,) = from_standbys.runtime.standbys.all()
    assert new is not old
    assert new.env["NEW"] == "1"


async def test_a_host_that_is_short_of_memory_keeps_none(from_standbys):
    await prepare(from_standbys)
    standbys = from_standbys.runtime.standbys
    standbys._available_bytes = lambda: 100 << 20
    await prepare(from_standbys)
    assert standbys.all() == []


async def test_none_is_made_where_that_is_switched_off(from_standbys):
    from_standbys.runtime.standbys._max = 0
    assert not json.loads((await run(from_standbys, MINE)).stdout)["is_from_standby"]
    await prepare(from_standbys)
    assert from_standbys.runtime.standbys.all() == []


async def test_an_image_with_code_that_runs_at_every_start_is_never_prepared(from_standbys):
    layer = from_standbys.images.layers_folder / "top/usr/local/lib"
    series = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (layer / series / "site-packages").mkdir(parents=True)
    (layer / series / "site-packages/own.pth").write_text("import os; os.environ['AT_START'] = '1'\n")
    await prepare(from_standbys)
    assert from_standbys.runtime.standbys.all() == []
    seen = json.loads((await run(from_standbys, MINE)).stdout)
    assert (seen["is_from_standby"], seen["environment"]["AT_START"]) == (False, "1")


WORKER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from starting import StandbyPlace
from aeolian.worker.runtimes.native import NativeRuntime
from aeolian.worker.runtimes.standby_fit import ENTRYPOINT_ARGV

async def main():
    place = StandbyPlace(Path(sys.argv[1]), None, Path(sys.argv[2]))
    await place.open(NativeRuntime)
    started = await place.start("sh", "-c", "echo ready; exec sleep 600")
    await started.line()
    await place.runtime.standbys.prepare(place.prepared(*ENTRYPOINT_ARGV).spec)
    (standby,) = place.runtime.standbys.all()
    print(standby.container.pid, started.running.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_killed_worker_leaves_no_standby(from_standbys, tmp_path, sdk_dir):
    data_dir = tmp_path / "other"
    place = Place(data_dir, tmp_path / "layers/base")
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, str(data_dir), str(sdk_dir), str(Path(__file__).parent),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert worker.stdout is not None
    watched = [os.pidfd_open(int(pid)) for pid in (await worker.stdout.readline()).split()]
    worker.kill()
    await worker.wait()
    for descriptor in watched:
        await has_ended(descriptor)
    runtime = NativeRuntime(data_dir, place.images, place.sdk)
    await runtime.open()
    await runtime.close()
    assert not Cgroups().process_ids(runtime.cgroup_of("").strip("/"))
    assert str(data_dir) not in Path("/proc/self/mountinfo").read_text()


async def until_ready(place: StandbyPlace) -> None:
    standbys = place.runtime.standbys
    standbys._make_wanted()
    for standby in standbys.all():
        await standby.is_settled.wait()
