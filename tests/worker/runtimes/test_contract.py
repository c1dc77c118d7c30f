"""What every runtime must do: the same tests on each one that this host offers."""

import asyncio
import signal

import pytest
from modal_proto import api_pb2
from starting import open_place

from aeolian.control.volume_commits import VolumeCommits
from aeolian.control.volumes import Volumes
from aeolian.domain.caller import Caller
from aeolian.domain.clock import SystemClock
from aeolian.domain.containers import VolumeMountSpec
from aeolian.domain.errors import FailedPrecondition
from aeolian.protocol.worker_volumes import WorkerVolumeCalls
from aeolian.storage.database import Database, metadata
from aeolian.storage.volume_files import VolumeFiles
from aeolian.worker.hooks.base import Bind
from aeolian.worker.hooks.volumes import VolumesHook
from aeolian.worker.rpc import ContainerServer, ContainerService
from aeolian.worker.sdk import own_version
from aeolian.worker.volume_authority import LinkedVolumeAuthority
from aeolian.worker.volumes import WorkerVolumes

NUM_LINES = 50_000


async def test_a_command_runs_in_its_image_with_its_environment(place):
    command = "cat /etc/small; pwd; echo $FROM_IMAGE $FROM_SPEC"
    ended = await place.run("sh", "-c", command, env={"FROM_SPEC": "too"})
    assert ended.stdout.splitlines() == ["of the top layer", "/root", "yes too"]
    assert (ended.status.exit_code, ended.stderr) == (0, "")


async def test_python_is_the_interpreter_of_the_image(place):
    ended = await place.run("python", "-c", "import sys; print(sys.executable, sys.stdin.read() == '')")
    assert ended.stdout.split()[0].startswith("/usr/local/bin/python")
    assert ended.stdout.split()[1] == "True", "stdin is /dev/null"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import os; os._exit(137)", 137),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import os; os.abort()", -signal.SIGABRT),
    ],
)
async def test_an_exit_code_and_the_signal_that_ended_it_are_told_apart(place, code, expected):
    ended = await place.run("python", "-c", code)
    assert (ended.status.exit_code, ended.status.oom_killed) == (expected, False)


async def test_a_working_directory_that_the_image_lacks_is_made(place):
    ended = await place.run("sh", "-c", "pwd", cwd="/srv/deep/down")
    assert (ended.stdout, ended.status.exit_code) == ("/srv/deep/down\n", 0)


async def test_no_line_of_a_chatty_command_is_lost(place):
    code = f"import sys\nfor n in range({NUM_LINES}): print(n); print(n, 'e' * 60, file=sys.stderr)"
    ended = await place.run("python", "-c", code)
    assert ended.stdout.splitlines() == [str(n) for n in range(NUM_LINES)]
    assert [int(line.split()[0]) for line in ended.stderr.splitlines()] == list(range(NUM_LINES))


async def test_an_interrupt_reaches_the_main_process(place):
    started = await place.start(
        "python", "-c",
        "import time\ntry:\n  print('ready', flush=True); time.sleep(600)\nexcept KeyboardInterrupt: print('interrupted')",
    )  # fmt: skip
    assert await started.line() == "ready"
    started.running.signal(signal.SIGINT)
    ended = await started.ended()
    assert (ended.stdout, ended.status.exit_code) == ("interrupted\n", 0)
    started.running.signal(signal.SIGINT)  # nobody is there any more


async def test_a_main_process_without_a_handler_dies_of_a_signal(place):
    started = await place.start("sh", "-c", "echo ready; exec sleep 600")
    assert await started.line() == "ready"
    started.running.signal(signal.SIGTERM)
    assert (await started.ended()).status.exit_code == -signal.SIGTERM


async def test_kill_ends_all_processes_of_a_container(place):
    code = (
        "import os, time\n"
        "for _ in range(3):\n"
        "  if os.fork() == 0: os.setsid(); time.sleep(600)\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    started = await place.start("python", "-c", code)
    assert await started.line() == "ready"
    started.running.kill()
    ended = await started.ended()  # its pipes are closed only when the last of them is dead
    assert ended.status.exit_code == -signal.SIGKILL


async def test_nothing_outlives_the_main_process(place):
    code = (
        "import os, time\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "  os.setsid()\n"
        "  if os.fork() == 0: print('daemon', flush=True); os.write(write, b'x'); time.sleep(600)\n"
        "  os._exit(0)\n"
        "os.read(read, 1)"
    )
    started = await place.start("python", "-c", code)
    assert await started.line() == "daemon"
    assert (await started.ended()).status.exit_code == 0


async def test_orphans_leave_no_zombies(place):
    code = (
        "import os, time\n"
        "for _ in range(5):\n"
        "  if os.fork() == 0:\n"
        "    if os.fork() == 0: os._exit(0)\n"
        "    os._exit(0)\n"
        "  os.wait()\n"
        "def state(pid):\n"
        "  try: return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0]\n"
        "  except FileNotFoundError: return ''\n"
        "deadline = time.monotonic() + 20\n"
        "while any(state(pid) == 'Z' for pid in os.listdir('/proc') if pid.isdigit()) and time.monotonic() < deadline:\n"
        "  time.sleep(0.01)\n"
        "print([pid for pid in os.listdir('/proc') if pid.isdigit() and state(pid) == 'Z'])"
    )
    assert (await place.run("python", "-c", code)).stdout == "[]\n"


async def test_binds_show_files_and_folders_of_the_host(place, tmp_path):
    shared, single = tmp_path / "shared", tmp_path / "single"
    shared.mkdir()
    (shared / "in").write_text("of the host\n")
    single.write_text("one file\n")
    start = place.prepared(
        "sh", "-c",
        "cat /new/place/in /root/single; echo back > /writable/out; echo no > /new/place/out || echo read-only",
    )  # fmt: skip
    start.binds += [
        Bind(shared, "/new/place"),
        Bind(single, "/root/single"),
        Bind(shared, "/writable", read_only=False),
    ]
    ended = await (await place.start(prepared=start)).ended()
    assert ended.stdout.splitlines() == ["of the host", "one file", "read-only"]
    assert (shared / "out").read_text() == "back\n"


async def test_a_bind_inside_another_one_is_seen_whatever_their_order(place, tmp_path):
    for name in ("outer/inner", "inside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "inside/file").write_text("inside\n")
    start = place.prepared("cat", "/outer/inner/file")
    start.binds += [Bind(tmp_path / "inside", "/outer/inner"), Bind(tmp_path / "outer", "/outer")]
    if place.runtime.name == "process":
        start.binds.reverse()  # it mounts them as they come
    assert (await (await place.start(prepared=start)).ended()).stdout == "inside\n"


async def test_what_a_container_writes_is_its_own_and_collected(place):
    one = await place.start("sh", "-c", "echo mine > /etc/small; echo new > /root/new; mkdir /data; echo ready; read x")
    assert await one.line() == "ready"
    await one.running.wait()
    upper = one.start.upper
    assert upper is not None
    assert (upper / "etc/small").read_text() == "mine\n"
    assert (upper / "root/new").read_text() == "new\n"
    assert (upper / "data").is_dir()
    two = await place.run("sh", "-c", "cat /etc/small; test -e /root/new || echo none")
    assert two.stdout.splitlines() == ["of the top layer", "none"]
    await one.ended()


async def test_ten_containers_start_at_once(place):
    code = "import os; print(os.environ['NUMBER'])"
    ended = await asyncio.gather(*(place.run("python", "-c", code, env={"NUMBER": str(n)}) for n in range(10)))
    assert [it.stdout for it in ended] == [f"{n}\n" for n in range(10)]


async def test_the_sdk_finds_its_worker_and_its_arguments(place):
    """The entrypoint of the real SDK, until it says hello on the container's own socket."""
    said: asyncio.Queue[str] = asyncio.Queue()

    async def hello(raw: bytes, key: str) -> bytes:
        said.put_nowait("hello")
        return b""

    async def beat(raw: bytes, key: str) -> bytes:
        await asyncio.sleep(3600)
        return b""

    async def result(raw: bytes, key: str) -> bytes:
        said.put_nowait(api_pb2.TaskResultRequest.FromString(raw).result.exception)
        return b""

    arguments = api_pb2.ContainerArguments(
        task_id="ta-1",
        function_id="fu-1",
        app_id="ap-1",
        function_def=api_pb2.Function(module_name="no_such_module", function_name="f", app_name="a"),
    )
    start = place.prepared(
        "python", "-m", "modal._container_entrypoint",
        arguments=arguments.SerializeToString(), sdk_version=own_version(), env={"MODAL_IS_REMOTE": "1"},
    )  # fmt: skip
    start.socket_path.unlink()
    own = {"ContainerHello": hello, "ContainerHeartbeat": beat, "TaskResult": result}
    server = ContainerServer(str(start.socket_path), ContainerService("ta-1", "", None, own))  # type: ignore[arg-type]
    await server.start()
    try:
        started = await place.start(prepared=start)
        assert await said.get() == "hello"
        assert "no_such_module" in await said.get()
        ended = await started.ended()
        assert ended.status.exit_code == 0, ended.stderr
    finally:
        await server.stop()


class OneEnvironment:
    id, name = "en-1", "main"

    def resolve(self, name, caller):
        return self


@pytest.mark.parametrize("kind", ["gvisor", "native", "native from standbys", "process"])
async def test_a_running_container_sees_what_others_commit_when_it_reloads(tmp_path, small_rootfs, sdk_dir, kind):
    name, _, from_standbys = kind.partition(" ")
    database = Database(f"sqlite:///{tmp_path}/test.db")
    metadata.create_all(database.engine)
    database.open()
    objects = Volumes(database, SystemClock(), OneEnvironment())
    calls = WorkerVolumeCalls(VolumeCommits(database, SystemClock(), VolumeFiles(tmp_path / "volumes/content")))
    volumes = WorkerVolumes(tmp_path, LinkedVolumeAuthority(calls.answer))
    try:
        sdk = sdk_dir if from_standbys else None
        async with open_place(name, tmp_path, small_rootfs, sdk, hooks=[VolumesHook(volumes)]) as place:
            await volumes.open()
            try:
                volume_id = (await objects.create("v", "", Caller("local", token_id="ak-1"))).volume_id
                await _reload_in(place, volumes, volume_id)
            finally:
                await volumes.close()
    finally:
        await database.close()


async def _reload_in(place, volumes, volume_id):
    """A file that is open keeps a container from reloading; without it the other one's file appears."""
    told = place.data_dir / "told"
    told.mkdir()
    bound = (VolumeMountSpec(volume_id, "/data"),)
    start = place.prepared(
        "python", "-c",
        "import os, time\n"
        "def wait_for(name):\n"
        "  while not os.path.exists('/told/' + name): time.sleep(0.01)\n"
        "file = open('/data/own', 'w'); print(os.listdir('/data'), flush=True); wait_for('close')\n"
        "file.close(); print('closed', flush=True); wait_for('look')\n"
        "print(open('/data/from_other').read(), os.listdir('/__modal/volumes/' + os.environ['VOLUME']))",
        volumes=bound, env={"VOLUME": volume_id},
    )  # fmt: skip
    start.binds.append(Bind(told, "/told"))
    reader = await place.start(prepared=start)
    assert await reader.line() == "['own']"
    writer = await place.run("sh", "-c", "printf hello > /data/from_other", volumes=bound)
    assert (writer.status.exit_code, writer.stderr) == (0, "")
    with pytest.raises(FailedPrecondition, match="open files"):
        await volumes.reload(start.spec.task_id, volume_id)
    (told / "close").touch()
    assert await reader.line() == "closed"
    await volumes.reload(start.spec.task_id, volume_id)
    (told / "look").touch()
    said = (await reader.ended()).stdout
    assert said.startswith("hello ") and "from_other" in said.partition(" ")[2]
