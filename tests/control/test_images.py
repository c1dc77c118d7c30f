import asyncio
import contextlib
import itertools
from types import SimpleNamespace

import msgspec
import pytest
from modal_proto import api_pb2

from aeolian.control import image_builds
from aeolian.control.environments import Environments
from aeolian.control.images import Images, Request
from aeolian.control.logs import AppLogs
from aeolian.control.secrets import Secrets
from aeolian.control.workers import Worker, Workers
from aeolian.domain.caller import Caller
from aeolian.domain.calls import Status
from aeolian.domain.clock import SystemClock
from aeolian.domain.containers import MountFile, MountSpec
from aeolian.domain.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unimplemented
from aeolian.domain.images import ImageSpec
from aeolian.domain.link import BuildImage, CancelBuild, Hello, LogLine
from aeolian.domain.logs import LogBatch
from aeolian.storage.database import Database, metadata

CALLER = Caller(workspace="local", token_id="ak-test", sdk_version="1.6.4")
CONTAINER = Caller(workspace="local", task_id="ta-1", app_id="ap-1", environment_name="main")
INFO = {
    "python_version": "3.11.7",
    "workdir": "/w",
    "libc_version": "glibc 2.36",
    "python_packages": '{"wheel": "1.0"}',
}


class SomeApps:
    """Apps that live until they are stopped."""

    def __init__(self):
        self.when_stopped = []
        self.stopped = set()
        self.environment_names = {}

    async def find_living(self, app_id, caller):
        if app_id in self.stopped:
            raise FailedPrecondition(f"App {app_id} has been stopped")
        return self.known(app_id)

    def known(self, app_id):
        return SimpleNamespace(app_id=app_id, environment_name=self.environment_names.get(app_id, "main"))

    def stop(self, app_id):
        self.stopped.add(app_id)
        for callback in self.when_stopped:
            callback(app_id)


class SomeMounts:
    async def spec(self, mount_id):
        if mount_id == "mo-unknown":
            raise NotFound(f"no mount {mount_id!r}: it was never created on this server")
        return MountSpec(mount_id, (MountFile("/data/a.txt", "ab" * 32, 3),))


class SomeFunctions:
    """Build functions over the image that their id names: `fu-A-im-1` of App `ap-A`."""

    def row(self, function_id, caller):
        if not function_id.startswith("fu-"):
            raise NotFound(f"there is no Function {function_id!r}")
        return SimpleNamespace(app_id=f"ap-{function_id.split('-')[1]}")

    def current(self, function_id):
        base = function_id.split("-", 2)[2]
        return SimpleNamespace(function=api_pb2.Function(is_builder_function=True, image_id=base))


class ScriptedCalls:
    """Calls whose outputs the test hands out."""

    def __init__(self):
        self.calls = {}
        self.started = asyncio.Queue()

    async def start(self, function_id, caller, *, call_type, invocation, inputs):
        call_id = f"fc-{caller.idempotency_key}"
        if call_id not in self.calls:
            self.calls[call_id] = asyncio.get_running_loop().create_future()
            self.started.put_nowait((call_id, function_id, inputs))
        return SimpleNamespace(call_id=call_id)

    async def get_outputs(self, call_id, caller, *, timeout_s):
        item = await asyncio.shield(self.calls[call_id])
        return SimpleNamespace(outputs=[SimpleNamespace(item=item.SerializeToString())])

    def finish(self, call_id, status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS, task_id="ta-c", **result):
        item = api_pb2.FunctionGetOutputsItem(task_id=task_id)
        item.result.CopyFrom(api_pb2.GenericResult(status=status, **result))
        self.calls[call_id].set_result(item)


class FakeWorker:
    """A node that is told to build, and answers when the test says so."""

    def __init__(self, server, worker_id="wo-1", image_ids=()):
        self.server = server
        self.worker_id = worker_id
        self.image_ids = set(image_ids)
        self.commands = asyncio.Queue()
        self._seq = itertools.count(1)
        self._lives = itertools.count(1)

    def connect(self):
        self.life = f"{self.worker_id}.{next(self._lives)}"
        hello = Hello(self.worker_id, self.life, ("process",), 2000, 4000, image_ids=tuple(self.image_ids))
        self.worker = Worker(hello, self.commands.put_nowait)
        self.server.workers.connected(self.worker)
        self.server.images.worker_connected(self.worker)
        return self

    def disconnect(self):
        self.server.workers.disconnected(self.worker)

    async def told(self) -> BuildImage:
        return await asyncio.wait_for(self.commands.get(), 5)

    async def say(self, image_id, *texts):
        lines = [LogLine(1, 1.0, text) for text in texts]
        await self.server.put_log(image_id, lines, self.life, next(self._seq))

    async def built(self, command, error="", info=None):
        await self.server.images.on_built(command.image_id, command.build_id, error, INFO if info is None else info)
        if not error:
            self.image_ids.add(command.image_id)
            self.worker.image_ids.add(command.image_id)

    async def build_next(self, error="") -> BuildImage:
        command = await self.told()
        await self.built(command, error)
        return command


class Server:
    """Everything that images need, over a database file."""

    def __init__(self, path):
        self.path = path

    async def __aenter__(self):
        self.database = Database(f"sqlite:///{self.path}")
        metadata.create_all(self.database.engine)
        self.database.open()
        clock = SystemClock()
        self.environments = Environments(self.database, clock)
        await self.environments.load()
        self.logs = AppLogs(self.database, clock)
        await self.logs.open()
        self.apps, self.workers, self.calls = SomeApps(), Workers(), ScriptedCalls()
        self.secrets = Secrets(self.database, clock, self.environments, b"k" * 32)
        self.images = Images(
            self.database,
            clock,
            self.apps,
            self.environments,
            self.workers,
            SomeMounts(),
            self.secrets,
            SomeFunctions(),
            self.calls,
            self.logs,
        )
        await self.images.load()
        await self.images.open()
        return self

    async def __aexit__(self, *error):
        await self.images.close()
        await self.logs.close()
        await self.database.close()

    async def ask(self, *commands, app_id="ap-1", caller=CALLER, version="2025.06", fields=None, **options):
        definition = api_pb2.Image(dockerfile_commands=commands or ["FROM python:3.11-slim"], **(fields or {}))
        return await self.images.get_or_create(Request(app_id, definition, version, **options), caller)

    async def ask_function(self, base_id, app="A", source="def f(): ..."):
        definition = api_pb2.Image(
            base_images=[api_pb2.BaseImage(docker_tag="base", image_id=base_id)],
            build_function=api_pb2.BuildFunction(definition=source),
        )
        request = Request(f"ap-{app}", definition, "2025.06", function_id=f"fu-{app}-{base_id}")
        return await self.images.get_or_create(request, CALLER)

    async def a_base(self, worker):
        image = await self.ask("FROM debian")
        await worker.build_next()
        await self.images.wait_built(image.image_id)
        return image

    async def put_log(self, image_id, lines, life, seq):
        """As the worker's link does."""
        place = self.images.log_place(image_id)
        await self.logs.append(place.app_id, place.task_id, "", lines, image_id, source=life, source_seq=seq)

    async def end_of(self, image_id):
        """The image once its build is over, and what the build has put out."""
        text = ""
        async with asyncio.timeout(10):
            async for item in self.images.follow(image_id, CALLER, "", 60):
                if not isinstance(item, tuple):
                    return item, text
                assert isinstance(item[1], LogBatch)
                text += "".join(line.data for line in item[1].lines)
        raise AssertionError("the build did not end")


@pytest.fixture
async def server(tmp_path):
    async with Server(tmp_path / "x.db") as server:
        yield server


@pytest.fixture
async def worker(server):
    return FakeWorker(server).connect()


# ---- once for everybody ---------------------------------------------------------------------------------


async def test_an_image_is_built_once_for_all_apps_that_define_it(server, worker):
    first = await server.ask("FROM debian", "RUN x")
    second = await server.ask("FROM debian", "RUN x", app_id="ap-2")
    assert first.image_id == second.image_id and first.status is Status.PENDING
    ends = [asyncio.create_task(server.end_of(first.image_id)) for _ in range(2)]
    command = await worker.told()
    await worker.say(command.image_id, "one\n")
    await worker.say(command.image_id, "two\n")
    await worker.built(command)
    for image, text in await asyncio.gather(*ends):
        assert image.status is Status.SUCCESS and text == "one\ntwo\n"
    assert (await server.ask("FROM debian", "RUN x", app_id="ap-3")).status is Status.SUCCESS
    assert worker.commands.empty()


async def test_the_worker_is_told_everything_that_the_definition_says(server, worker):
    base = await server.a_base(worker)
    secret = await server.secrets.create("s", "", CALLER, {"TOKEN": "t"}, if_exists="fail")
    registry = await server.secrets.create(
        "r", "", CALLER, {"REGISTRY_USERNAME": "u", "REGISTRY_PASSWORD": "p"}, if_exists="fail"
    )
    image = await server.ask(
        "FROM base",
        "COPY . /",
        fields={
            "base_images": [api_pb2.BaseImage(docker_tag="base", image_id=base.image_id)],
            "context_files": [api_pb2.ImageContextFile(filename="/.r.txt", data=b"x")],
            "context_mount_id": "mo-1",
            "secret_ids": [secret.object_id],
            "build_args": {"A": "1"},
            "gpu_config": api_pb2.GPUConfig(gpu_type="H100", count=2),
            "arch": api_pb2.ARCH_X86_64,
            "image_registry_config": api_pb2.ImageRegistryConfig(
                registry_auth_type=api_pb2.REGISTRY_AUTH_TYPE_STATIC_CREDS, secret_id=registry.object_id
            ),
        },
    )
    command = await worker.told()
    spec = msgspec.msgpack.decode(command.spec, type=ImageSpec)
    assert command.image_id == image.image_id and command.env == {"TOKEN": "t"} and not command.force
    assert spec.dockerfile_commands == ("FROM base", "COPY . /") and spec.base_image_ids == {"base": base.image_id}
    assert spec.context[0].path == "/data/a.txt" and spec.context_files[0].data == b"x"
    assert spec.build_args == {"A": "1"} and spec.gpu == "H100:2" and spec.arch == "x86_64"
    assert (spec.registry.username, spec.registry.password) == ("u", "p")


async def test_equal_variables_of_different_secrets_make_the_same_image_and_changed_ones_another(server, worker):
    made = [await server.secrets.create_anonymous("", CALLER, {"K": "1"}, app_id=f"ap-{n}") for n in range(2)]
    ids = [(await server.ask(fields={"secret_ids": [secret.object_id]})).image_id for secret in made]
    assert ids[0] == ids[1]
    await server.secrets.update(made[0].object_id, CALLER, {"K": "2"})
    assert (await server.ask(fields={"secret_ids": [made[0].object_id]})).image_id != ids[0]


@pytest.mark.parametrize(
    "change",
    [
        {"commands": ("FROM debian", "RUN y")},
        {"version": "2024.10"},
        {"fields": {"build_args": {"A": "1"}}},
        {"fields": {"context_mount_id": "mo-2"}},
        {"fields": {"context_files": [api_pb2.ImageContextFile(filename="/a", data=b"b")]}},
    ],
)
async def test_what_changes_the_result_changes_the_id(server, change):
    before = await server.ask("FROM debian", "RUN x")
    commands = change.pop("commands", ("FROM debian", "RUN x"))
    assert (await server.ask(*commands, **change)).image_id != before.image_id


async def test_finished_images_are_known_after_a_restart(tmp_path):
    async with Server(tmp_path / "x.db") as server:
        worker = FakeWorker(server).connect()
        image = await server.a_base(worker)
    async with Server(tmp_path / "x.db") as server:
        again = await server.ask("FROM debian")
        assert (again.image_id, again.status) == (image.image_id, Status.SUCCESS)
        assert server.images.builder_version_of(image.image_id) == "2025.06"
        await server.images.wait_built(image.image_id)


# ---- failures -------------------------------------------------------------------------------------------


async def test_a_failed_build_says_why_and_is_tried_again_when_asked_again(server, worker):
    image = await server.ask("FROM debian", "RUN false")
    await worker.build_next("step 2 `RUN false` failed with exit code 1")
    failed, _ = await server.end_of(image.image_id)
    assert failed.status is Status.FAILURE and "RUN false" in failed.error
    with pytest.raises(FailedPrecondition, match="RUN false"):
        await server.images.wait_built(image.image_id)
    again = await server.ask("FROM debian", "RUN false")
    assert again.image_id == image.image_id and again.status is Status.PENDING
    await worker.build_next()
    assert (await server.end_of(image.image_id))[0].status is Status.SUCCESS


async def test_output_of_a_new_build_is_not_mixed_with_that_of_the_failed_one(server, worker):
    image = await server.ask("FROM debian", "RUN x")
    command = await worker.told()
    await worker.say(image.image_id, "first\n")
    await worker.built(command, "no")
    assert (await server.end_of(image.image_id))[1] == "first\n"
    await server.ask("FROM debian", "RUN x", app_id="ap-2")
    command = await worker.told()
    await worker.say(image.image_id, "second\n")
    await worker.built(command)
    assert (await server.end_of(image.image_id))[1] == "second\n"


async def test_an_old_end_that_a_worker_repeats_does_not_end_the_new_build(server, worker):
    image = await server.ask("FROM debian", "RUN x")
    old = await worker.build_next("no")
    await server.end_of(image.image_id)
    await server.ask("FROM debian", "RUN x")
    new = await worker.told()
    await worker.built(old, "no")
    await worker.built(new)
    assert (await server.end_of(image.image_id))[0].status is Status.SUCCESS


async def test_an_image_over_a_failed_base_is_refused_and_one_over_a_base_under_way_waits(server, worker):
    base = await server.ask("FROM debian")
    over = {"base_images": [api_pb2.BaseImage(docker_tag="base", image_id=base.image_id)]}
    image = await server.ask("FROM base", "RUN x", fields=over)
    command = await worker.told()
    assert command.image_id == base.image_id and worker.commands.empty()
    await worker.built(command, "no network")
    failed, _ = await server.end_of(image.image_id)
    assert "base image" in failed.error and "no network" in failed.error
    with pytest.raises(FailedPrecondition, match="no network"):
        await server.ask("FROM base", "RUN y", fields=over)


async def test_a_missing_worker_is_waited_for_and_then_said(server, monkeypatch):
    monkeypatch.setattr(image_builds, "NO_WORKER_S", 0.05)
    image = await server.ask()
    failed, _ = await server.end_of(image.image_id)
    assert failed.status is Status.FAILURE and "no worker" in failed.error
    monkeypatch.setattr(image_builds, "NO_WORKER_S", 60)
    await server.ask()
    worker = FakeWorker(server).connect()
    await worker.build_next()
    assert (await server.end_of(image.image_id))[0].status is Status.SUCCESS


async def test_a_secret_that_lacks_the_registrys_credentials_fails_the_build_naming_them(server, worker):
    secret = await server.secrets.create("r", "", CALLER, {"REGISTRY_USERNAME": "u"}, if_exists="fail")
    config = api_pb2.ImageRegistryConfig(
        registry_auth_type=api_pb2.REGISTRY_AUTH_TYPE_STATIC_CREDS, secret_id=secret.object_id
    )
    image = await server.ask(fields={"image_registry_config": config})
    failed, _ = await server.end_of(image.image_id)
    assert "REGISTRY_PASSWORD" in failed.error


# ---- interruptions --------------------------------------------------------------------------------------


async def test_a_worker_that_comes_back_is_asked_for_the_same_build(server, worker):
    image = await server.ask()
    before = await worker.told()
    worker.disconnect()
    worker.connect()
    after = await worker.told()
    assert after == before
    await worker.built(after)
    assert (await server.end_of(image.image_id))[0].status is Status.SUCCESS


async def test_another_worker_takes_over_from_one_that_stays_away(server, worker, monkeypatch):
    monkeypatch.setattr(image_builds, "AWAY_S", 0.05)
    image = await server.ask()
    before = await worker.told()
    other = FakeWorker(server, "wo-2").connect()
    worker.disconnect()
    assert await other.build_next() == before
    assert (await server.end_of(image.image_id))[0].status is Status.SUCCESS


async def test_a_restarted_server_goes_on_with_builds_and_their_output(tmp_path):
    async with Server(tmp_path / "x.db") as server:
        worker = FakeWorker(server).connect()
        image = await server.ask()
        command = await worker.told()
        await worker.say(image.image_id, "before\n")
        entries = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                async for entry_id, _ in server.images.follow(image.image_id, CALLER, "", 60):
                    entries.append(entry_id)
    async with Server(tmp_path / "x.db") as server:
        worker.server = server
        worker.connect()
        assert await worker.told() == command
        await worker.say(image.image_id, "after\n")
        await worker.built(command)
        assert (await server.end_of(image.image_id))[1] == "before\nafter\n"
        rest = [item async for item in server.images.follow(image.image_id, CALLER, entries[-1], 60)]
        assert [line.data for line in rest[0][1].lines] == ["after\n"] and rest[1].status is Status.SUCCESS


async def test_output_that_is_delivered_twice_is_kept_once(server, worker):
    image = await server.ask()
    command = await worker.told()
    for _ in range(2):
        await server.put_log(image.image_id, [LogLine(1, 1.0, "line\n")], worker.life, 7)
    await worker.built(command)
    assert (await server.end_of(image.image_id))[1] == "line\n"


async def test_an_image_that_no_worker_has_any_more_is_built_again(server, worker):
    base = await server.a_base(worker)
    worker.disconnect()
    worker.image_ids.clear()
    worker.connect()
    waiting = asyncio.create_task(server.images.wait_built(base.image_id))
    assert (await worker.build_next()).image_id == base.image_id
    await waiting
    assert (await server.ask("FROM debian")).status is Status.SUCCESS


async def test_a_lost_base_is_built_again_before_what_lies_on_it(server, worker):
    base = await server.a_base(worker)
    worker.disconnect()
    worker.image_ids.clear()
    worker.connect()
    over = {"base_images": [api_pb2.BaseImage(docker_tag="base", image_id=base.image_id)]}
    image = await server.ask("FROM base", "RUN x", fields=over)
    assert [(await worker.build_next()).image_id for _ in range(2)] == [base.image_id, image.image_id]


async def test_a_build_ends_when_all_apps_that_wait_for_it_are_stopped(server, worker):
    image = await server.ask()
    await server.ask(app_id="ap-2")
    command = await worker.told()
    server.apps.stop("ap-1")
    assert worker.commands.empty()
    server.apps.stop("ap-2")
    ended, _ = await server.end_of(image.image_id)
    assert ended.status is Status.TERMINATED and "ap-2" in ended.error
    assert await worker.told() == CancelBuild(image.image_id, command.build_id)


# ---- without the cache ----------------------------------------------------------------------------------


async def test_a_forced_build_gets_its_own_id_and_is_the_current_one_once_it_is_built(server, worker):
    old = await server.a_base(worker)
    fresh = await server.ask("FROM debian", force_build=True)
    command = await worker.told()
    assert fresh.image_id != old.image_id and command.force
    assert (await server.ask("FROM debian")).image_id == old.image_id, "not yet"
    assert (await server.ask("FROM debian", force_build=True)).image_id == fresh.image_id, "the same build"
    await worker.built(command)
    await server.images.wait_built(fresh.image_id)
    assert (await server.ask("FROM debian")).image_id == fresh.image_id
    await server.images.wait_built(old.image_id)


async def test_a_forced_build_that_fails_leaves_the_current_image(server, worker):
    old = await server.a_base(worker)
    fresh = await server.ask("FROM debian", force_build=True)
    await worker.build_next("no")
    await server.end_of(fresh.image_id)
    assert (await server.ask("FROM debian")).image_id == old.image_id


async def test_an_image_built_beside_the_cache_is_never_the_current_one(server, worker):
    old = await server.a_base(worker)
    beside = await server.ask("FROM debian", ignore_cache=True)
    await worker.build_next()
    await server.images.wait_built(beside.image_id)
    assert beside.image_id != old.image_id
    assert (await server.ask("FROM debian")).image_id == old.image_id


# ---- build functions ------------------------------------------------------------------------------------


async def test_a_build_function_runs_once_and_its_container_becomes_the_image(server, worker):
    base = await server.a_base(worker)
    image = await server.ask_function(base.image_id)
    call_id, function_id, inputs = await server.calls.started.get()
    assert inputs == [(0, b"")]
    saved = server.images.saved_from(function_id)
    assert saved.image_id == image.image_id and saved.build_id == image.build_id
    await worker.say(saved.image_id, "from the function\n")
    server.calls.finish(call_id)
    await server.images.on_built(saved.image_id, saved.build_id, "", INFO)
    built, text = await server.end_of(image.image_id)
    assert built.status is Status.SUCCESS and text == "from the function\n"
    worker.worker.image_ids.add(image.image_id)
    await server.images.wait_built(image.image_id)
    assert server.images.saved_from(function_id).image_id == ""
    assert (await server.ask_function(base.image_id)).status is Status.SUCCESS
    assert server.calls.started.empty()


async def test_a_build_function_that_raises_fails_the_build_with_its_traceback(server, worker):
    base = await server.a_base(worker)
    image = await server.ask_function(base.image_id)
    call_id, _, _ = await server.calls.started.get()
    server.calls.finish(
        call_id,
        api_pb2.GenericResult.GENERIC_STATUS_FAILURE,
        exception="ValueError('no')",
        traceback="Traceback (most recent call last): …\nValueError: no\n",
    )
    failed, _ = await server.end_of(image.image_id)
    assert failed.status is Status.FAILURE
    assert failed.error == "Traceback (most recent call last): …\nValueError: no"


async def test_a_build_function_that_takes_too_long_is_a_timeout(server, worker):
    base = await server.a_base(worker)
    image = await server.ask_function(base.image_id)
    call_id, _, _ = await server.calls.started.get()
    server.calls.finish(call_id, api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT, exception="too long")
    assert (await server.end_of(image.image_id))[0].status is Status.TIMEOUT


async def test_a_container_that_is_lost_before_its_files_are_kept_makes_the_function_run_again(server, worker):
    base = await server.a_base(worker)
    image = await server.ask_function(base.image_id)
    first, function_id, _ = await server.calls.started.get()
    server.calls.finish(first, task_id="ta-lost")
    server.images.container_ended(SimpleNamespace(task_id="ta-lost", function_id=function_id))
    second, _, _ = await asyncio.wait_for(server.calls.started.get(), 5)
    assert second != first
    server.calls.finish(second, task_id="ta-kept")
    await server.images.on_built(image.image_id, image.build_id, "", INFO)
    server.images.container_ended(SimpleNamespace(task_id="ta-kept", function_id=function_id))
    assert (await server.end_of(image.image_id))[0].status is Status.SUCCESS


async def test_files_that_cannot_be_kept_fail_the_build(server, worker):
    base = await server.a_base(worker)
    image = await server.ask_function(base.image_id)
    call_id, _, _ = await server.calls.started.get()
    server.calls.finish(call_id)
    await server.images.on_built(image.image_id, image.build_id, "the disk is full", {})
    failed, _ = await server.end_of(image.image_id)
    assert failed.status is Status.FAILURE and failed.error == "the disk is full"


async def test_the_function_of_another_app_takes_over_when_the_first_app_is_stopped(server, worker):
    base = await server.a_base(worker)
    image = await server.ask_function(base.image_id, "A")
    assert (await server.ask_function(base.image_id, "B")).image_id == image.image_id
    call_id, function_id, _ = await server.calls.started.get()
    assert function_id.startswith("fu-A")
    server.calls.finish(call_id, api_pb2.GenericResult.GENERIC_STATUS_TERMINATED, exception="App ap-A was stopped")
    server.apps.stop("ap-A")
    call_id, function_id, _ = await asyncio.wait_for(server.calls.started.get(), 5)
    assert function_id.startswith("fu-B")
    server.calls.finish(call_id)
    await server.images.on_built(image.image_id, image.build_id, "", INFO)
    assert (await server.end_of(image.image_id))[0].status is Status.SUCCESS


async def test_a_restarted_server_asks_for_the_same_call_of_a_build_function(tmp_path):
    async with Server(tmp_path / "x.db") as server:
        worker = FakeWorker(server).connect()
        base = await server.a_base(worker)
        image = await server.ask_function(base.image_id)
        before, _, _ = await server.calls.started.get()
    async with Server(tmp_path / "x.db") as server:
        after, function_id, _ = await asyncio.wait_for(server.calls.started.get(), 5)
        assert after == before and server.images.saved_from(function_id).image_id == image.image_id
        server.calls.finish(after)
        await server.images.on_built(image.image_id, image.build_id, "", INFO)
        assert (await server.end_of(image.image_id))[0].status is Status.SUCCESS


# ---- what is refused ------------------------------------------------------------------------------------

FUNCTION = api_pb2.BuildFunction(definition="x")
ONE_BASE = [api_pb2.BaseImage(docker_tag="base", image_id="im-x")]
AWS = api_pb2.ImageRegistryConfig(registry_auth_type=api_pb2.REGISTRY_AUTH_TYPE_AWS, secret_id="st-x")


@pytest.mark.parametrize(
    ("definition", "options", "kind", "text"),
    [
        (api_pb2.Image(), {}, InvalidArgument, "neither"),
        (api_pb2.Image(dockerfile_commands=["FROM a"], build_function=FUNCTION), {}, InvalidArgument, "same layer"),
        (api_pb2.Image(build_function=FUNCTION, base_images=ONE_BASE), {}, InvalidArgument, "build_function_id"),
        (api_pb2.Image(build_function=FUNCTION), {"function_id": "fu-A-im"}, InvalidArgument, "one base image"),
        (api_pb2.Image(dockerfile_commands=["FROM a"]), {"builder_version": "1999"}, InvalidArgument, "2025.06"),
        (api_pb2.Image(dockerfile_commands=["FROM a"], base_images=ONE_BASE), {}, NotFound, "im-x"),
        (api_pb2.Image(dockerfile_commands=["FROM a"], context_mount_id="mo-unknown"), {}, NotFound, "mo-unknown"),
        (api_pb2.Image(dockerfile_commands=["FROM a"], secret_ids=["st-x"]), {}, NotFound, "st-x"),
        (
            api_pb2.Image(dockerfile_commands=["FROM a"], base_images=[*ONE_BASE, *ONE_BASE]),
            {},
            InvalidArgument,
            "base",
        ),
        (api_pb2.Image(dockerfile_commands=["FROM a"], image_registry_config=AWS), {}, Unimplemented, "aws ecr"),
        (
            api_pb2.Image(dockerfile_commands=["FROM a"], volume_mounts=[api_pb2.VolumeMount(volume_id="vo-1")]),
            {},
            Unimplemented,
            "Volumes",
        ),
    ],
)
async def test_definitions_that_cannot_be_built_are_refused(server, definition, options, kind, text):
    request = Request(**{"app_id": "ap-1", "definition": definition, "builder_version": "2025.06", **options})
    with pytest.raises(kind, match=text):
        await server.images.get_or_create(request, CALLER)


async def test_a_container_builds_only_for_apps_of_its_environment(server):
    server.apps.environment_names["ap-dev"] = "dev"
    assert await server.ask(caller=CONTAINER)
    with pytest.raises(PermissionDenied, match=r"'main'.*'dev'"):
        await server.ask(app_id="ap-dev", caller=CONTAINER)


async def test_images_of_another_workspace_do_not_exist(server, worker):
    image = await server.a_base(worker)
    other = Caller(workspace="other", token_id="ak-o")
    with pytest.raises(NotFound, match=image.image_id):
        await server.images.get(image.image_id, other)
    assert await server.images.describe({image.image_id}, other) == {}
    assert (await server.ask("FROM debian", caller=other)).image_id != image.image_id


# ---- finding and deleting -------------------------------------------------------------------------------


async def test_the_chain_of_an_image_begins_with_its_lowest_base(server, worker):
    base = await server.a_base(worker)
    over = {"base_images": [api_pb2.BaseImage(docker_tag="base", image_id=base.image_id)]}
    image = await server.ask("FROM base", "RUN x", fields=over)
    assert [one.image_id for one in await server.images.chain(image.image_id, CALLER)] == [
        base.image_id,
        image.image_id,
    ]


async def test_a_deleted_image_is_gone_with_its_names_and_can_be_built_again(server, worker):
    image = await server.a_base(worker)
    names = server.images.names
    name = names.parse("n", "", CALLER)
    await names.publish(image, name, CALLER)
    await server.images.delete(image.image_id, CALLER)
    with pytest.raises(NotFound):
        await server.images.wait_built(image.image_id)
    with pytest.raises(NotFound, match="n:latest"):
        await names.find(name)
    assert (await server.ask("FROM debian")).status is Status.PENDING
    with pytest.raises(FailedPrecondition, match="being built"):
        await server.images.delete(image.image_id, CALLER)


# ---- names ----------------------------------------------------------------------------------------------


async def test_a_name_points_at_the_image_published_last_and_keeps_its_history(server, worker):
    images = [await server.a_base(worker)]
    images.append(await server.ask("FROM other"))
    await worker.build_next()
    names = server.images.names
    name = names.parse("main/n:v1", "", CALLER)
    revisions = [await names.publish(image, name, CALLER) for image in images]
    assert (await names.find(name)).image_id == images[1].image_id
    page, token = await names.revisions(name, limit=1, page_token="")
    assert [one.revision_id for one in page] == revisions[1:]
    page, token = await names.revisions(name, limit=1, page_token=token)
    assert [one.revision_id for one in page] == revisions[:1] and token == ""
    await names.delete(name, CALLER)
    assert await names.revisions(name, limit=10, page_token="") == ([], "")
    with pytest.raises(NotFound, match="n:v1"):
        await names.delete(name, CALLER)


async def test_names_are_listed_by_environment_prefix_and_image_in_pages(server, worker):
    image = await server.a_base(worker)
    await server.environments.create("dev")
    names = server.images.names
    for text in ("a:1", "a:2", "ab:1", "a_b", "dev/z"):
        await names.publish(image, names.parse(text, "", CALLER), CALLER)

    async def listed(prefix="", image_id="", limit=0, page_token="", environment=""):
        name, tags, token = await names.list_in(
            environment, CALLER, prefix=prefix, image_id=image_id, limit=limit, page_token=page_token
        )
        return name, [tag.tag for tag in tags], token

    assert await listed(prefix="a:") == ("main", ["a:1", "a:2"], "")
    assert await listed(prefix="a_") == ("main", ["a_b:latest"], "")
    assert await listed(image_id="im-other") == ("main", [], "")
    assert await listed(environment="dev") == ("dev", ["z:latest"], "")
    assert await listed(limit=2) == ("main", ["a:1", "a:2"], "a:2")
    assert await listed(limit=2, page_token="a:2") == ("main", ["a_b:latest", "ab:1"], "")
    await names.delete_in(server.environments.resolve("dev", CALLER).id)
    assert await listed(environment="dev") == ("dev", [], "")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", InvalidArgument),
        ("im-abc", InvalidArgument),
        ("a b", InvalidArgument),
        ("a:", InvalidArgument),
        ("a:b:c", InvalidArgument),
        ("x" * 65, InvalidArgument),
        ("nowhere/a", NotFound),
    ],
)
async def test_names_that_cannot_be_are_refused(server, text, kind):
    with pytest.raises(kind):
        server.images.names.parse(text, "", CALLER)


async def test_a_container_finds_names_anywhere_but_changes_only_those_of_its_environment(server, worker):
    image = await server.a_base(worker)
    await server.environments.create("dev")
    names = server.images.names
    in_dev = names.parse("dev/n", "", CONTAINER)
    await names.publish(image, names.parse("n", "", CONTAINER), CONTAINER)
    await names.publish(image, in_dev, CALLER)
    assert (await names.find(in_dev)).image_id == image.image_id
    for change in (names.publish(image, in_dev, CONTAINER), names.delete(in_dev, CONTAINER)):
        with pytest.raises(PermissionDenied, match="'dev'"):
            await change
