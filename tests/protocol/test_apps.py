import asyncio
import json
import signal
import sys
import time

import pytest
from app_server import CALLER, AppServer

from aeolian.domain.apps import AppState
from aeolian.domain.link import LogLine

APP = """
import modal
app = modal.App("greeter")

@app.function(max_containers=3)
def hello(name: str): return "hello " + name

@app.function(volumes={"/data": modal.Volume.from_name("v", create_if_missing=True)})
def world(): ...

@app.cls(timeout=77)
class Model:
    size: int = modal.parameter(default=1)
    @modal.method()
    def ask(self, text): ...

@app.local_entrypoint()
def main():
    print("in main", hello.object_id)
"""


@pytest.fixture
async def server(tmp_path):
    async with AppServer(tmp_path / "a.db") as server:
        yield server


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "greeter.py").write_text(APP)
    return folder


def edit(source, old, new):
    file = source / "greeter.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


async def test_an_app_run_comes_up_runs_its_entrypoint_and_ends(server, source):
    output = await server.modal("run", "greeter.py", cwd=source)
    assert "Created Function hello" in output.replace("function", "Function")
    assert "in main fu-" in output
    assert "App completed" in output
    assert [kind for kind, _ in server.fleet.events] == ["changed", "stop"]
    app_id = server.fleet.events[-1][1]
    assert server.apps.is_over(app_id)
    assert "stopped" in await server.modal("app", "list")


async def test_a_detached_run_ends_when_its_work_is_finished(server, source):
    server.fleet.idle = False
    run = asyncio.create_task(server.modal("run", "--detach", "greeter.py", cwd=source))
    while not (apps := [a for a in server.apps.living_apps() if a.state is AppState.DETACHED_DISCONNECTED]):
        await asyncio.sleep(0.05)
        assert not run.done(), run.result()
    server.fleet.idle = True
    await server.apps.work_finished(apps[0].app_id)
    assert "App completed" in await asyncio.wait_for(run, 30)


async def test_redeploys_keep_ids_skip_what_is_equal_and_can_be_rolled_back(server, source):
    assert "App deployed" in await server.modal("deploy", "greeter.py", cwd=source)
    app = server.apps.deployed("greeter", "", CALLER)
    first = server.functions.layout(app.app_id)
    assert set(first.functions) == {"hello", "world", "Model.*"} and set(first.classes) == {"Model"}
    assert "no changes detected" in await server.modal("deploy", "greeter.py", cwd=source)

    edit(source, "max_containers=3", "max_containers=4")
    edit(source, "@app.function(volumes", "# @app.function(volumes")
    assert "App deployed" in await server.modal("deploy", "greeter.py", "--tag", "two", cwd=source)
    second = server.functions.layout(app.app_id)
    hello = first.functions["hello"].function_id
    assert second.functions["hello"].function_id == hello
    assert server.functions.pool_settings(hello).max_containers == 4
    assert ("retire", {first.functions["world"].function_id}) in server.fleet.events

    assert "successful" in await server.modal("app", "rollback", "greeter")
    assert server.functions.pool_settings(hello).max_containers == 3
    assert server.functions.layout(app.app_id) == first
    before = server.functions.pool_settings(hello)
    assert "Rollover completed" in await server.modal("app", "rollover", "greeter")
    after = server.functions.pool_settings(hello)
    assert after.definition_id == before.definition_id and after.revision != before.revision

    history = json.loads(await server.modal("app", "history", "greeter", "--json"))
    assert [entry["version"] for entry in history] == ["v4", "v3", "v2", "v1"]
    assert history[2]["tag"] == "two" and history[0]["client"] == "1.6.4"
    info = json.loads(await server.modal("app", "info", "greeter", "--json"))
    assert info["lifecycle"]["version"] == 4 and set(info["functions"]) == {"hello", "world", "Model.*"}
    assert "deployed" in await server.modal("app", "list")

    await server.modal("app", "stop", "greeter", "--yes")
    assert "already stopped" in await server.modal("app", "stop", "greeter", "--yes", ok=False)
    assert "No App with name 'nobody'" in await server.modal("app", "history", "nobody", ok=False)


async def test_everything_is_there_after_a_restart(tmp_path, source):
    async with AppServer(tmp_path / "a.db") as server:
        await server.modal("deploy", "greeter.py", cwd=source)
        app = server.apps.deployed("greeter", "", CALLER)
        layout = server.functions.layout(app.app_id)
        arguments = server.functions.container_arguments(layout.functions["hello"].function_id, "ta-1")
    async with AppServer(tmp_path / "a.db") as server:
        assert server.apps.deployed("greeter", "", CALLER) == app
        assert server.functions.layout(app.app_id) == layout
        assert server.functions.container_arguments(layout.functions["hello"].function_id, "ta-1") == arguments
        assert "no changes detected" in await server.modal("deploy", "greeter.py", cwd=source)


async def test_a_failed_first_deployment_leaves_nothing(server, source):
    edit(source, "max_containers=3", "max_containers=3, timeout=90000")
    assert "the limit is 86400" in await server.modal("deploy", "greeter.py", cwd=source, ok=False)
    assert server.apps.living_apps() == []


async def test_a_draft_that_fails_changes_nothing_for_the_deployed_app(server, source):
    await server.modal("deploy", "greeter.py", cwd=source)
    app = server.apps.deployed("greeter", "", CALLER)
    hello = server.functions.layout(app.app_id).functions["hello"].function_id
    pool = server.functions.pool_settings(hello)
    edit(source, "max_containers=3", "max_containers=9")
    edit(source, "timeout=77", "timeout=90000")
    await server.modal("deploy", "greeter.py", cwd=source, ok=False)
    assert server.functions.pool_settings(hello) == pool
    assert server.apps.deployed("greeter", "", CALLER).version == 1


async def test_apps_of_one_name_live_in_each_environment(server, source):
    await server.modal("deploy", "greeter.py", cwd=source)
    await server.modal("deploy", "greeter.py", "--env", "dev", cwd=source)
    main, dev = (server.apps.deployed("greeter", name, CALLER) for name in ("main", "dev"))
    assert main.app_id != dev.app_id
    assert dev.app_id in await server.modal("app", "list", "--env", "dev")
    assert dev.app_id not in await server.modal("app", "list")


async def test_functions_are_looked_up_by_name_bound_and_scaled(server, source):
    await server.modal("deploy", "greeter.py", cwd=source)
    code = """
import modal
hello = modal.Function.from_name("greeter", "hello").hydrate()
one = hello.with_options(timeout=5, max_containers=7).hydrate()
again = modal.Function.from_name("greeter", "hello").with_options(timeout=5, max_containers=7).hydrate()
assert one.object_id == again.object_id != hello.object_id
print("option", one.object_id)
print("stacked", one.with_concurrency(max_inputs=5).hydrate().object_id)
Model = modal.Cls.from_name("greeter", "Model")
a, b = Model(size=2), Model(size=3)
def service(obj):
    f = obj.ask
    f.hydrate()
    return f.object_id
assert service(Model(size=2)) == service(a) != service(b)
print("param", service(a))
print("batch", service(Model.with_batching(max_batch_size=4, wait_ms=10)(size=2)))
print("settings", hello.autoscaler.update(min_containers=1, scaledown_window=120))
print("settings", hello.autoscaler.settings())
print("pinned", modal.Function.from_name("greeter", "hello", version=1).hydrate().object_id)
for name, call in [
    ("class", lambda: modal.Function.from_name("greeter", "Model").hydrate()),
    ("function", lambda: modal.Function.from_name("greeter", "nope").hydrate()),
    ("app", lambda: modal.Function.from_name("nope", "nope").hydrate()),
    ("version", lambda: modal.Function.from_name("greeter", "hello", version=8).hydrate()),
    ("id", lambda: modal.Function.from_id("fu-0000000000000000000000").hydrate()),
    ("cls", lambda: modal.Cls.from_name("greeter", "hello").hydrate()),
]:
    try:
        call()
    except modal.exception.NotFoundError as exc:
        print("missing", name, exc)
"""
    output = await server.python(code)
    ids = {line.split()[0]: line.split()[1] for line in output.splitlines() if "fu-" in line}
    pool = server.functions.pool_settings
    assert (pool(ids["option"]).timeout_s, pool(ids["option"]).max_containers) == (5, 7)
    assert (pool(ids["stacked"]).timeout_s, pool(ids["stacked"]).max_concurrent_inputs) == (5, 5)
    assert pool(ids["stacked"]).base_function_id == pool(ids["option"]).base_function_id
    assert pool(ids["param"]).serialized_params and pool(ids["param"]).timeout_s == 77
    assert (pool(ids["batch"]).batch_max_size, pool(ids["batch"]).batch_linger_ms) == (4, 10)
    assert "min_containers=1" in output and "scaledown_window=120" in output
    assert "missing class Function 'Model' from the 'greeter' app is a modal.Cls" in output
    assert output.count("missing ") == 6
    hello = pool(ids["option"]).base_function_id
    assert server.functions.autoscaler_settings(hello).min_containers == 1

    edit(source, "max_containers=3", "max_containers=4")
    await server.modal("deploy", "greeter.py", cwd=source)
    assert server.functions.autoscaler_settings(hello).min_containers == 0  # a deployment wipes overrides
    assert pool(ids["pinned"]).max_containers == 3
    assert pool(ids["option"]).max_containers == 7

    assert hello in await server.modal("function", "info", "greeter/hello")
    variants = json.loads(await server.modal("function", "variants", "greeter/hello", "--json"))
    assert {variant["function_id"] for variant in variants} == {ids["option"], ids["stacked"]}
    assert "fu-" in await server.modal("function", "variants", "greeter/Model.*")


async def test_container_arguments_hold_the_layout_and_every_dependency(server, source):
    await server.modal("deploy", "greeter.py", cwd=source)
    from modal_proto import api_pb2

    layout = server.functions.layout(server.apps.deployed("greeter", "", CALLER).app_id)
    world = layout.functions["world"].function_id
    arguments = api_pb2.ContainerArguments.FromString(server.functions.container_arguments(world, "ta-1"))
    objects = {item.object_id: item for item in arguments.app_layout.objects}
    assert arguments.task_id == "ta-1" and arguments.environment_name == "main"
    assert dict(arguments.app_layout.function_ids)["world"] == world
    assert objects[layout.classes["Model"]].HasField("class_handle_metadata")
    assert objects[layout.functions["Model.*"].function_id].function_handle_metadata.method_handle_metadata["ask"]
    dependencies = [item.object_id for item in arguments.function_def.object_dependencies]
    volume = next(item for item in dependencies if item.startswith("vo-"))
    assert objects[volume].HasField("volume_metadata")
    assert set(dependencies) <= objects.keys()
    assert server.functions.pool_settings(world).volumes[0].path == "/data"


async def test_a_definition_that_names_missing_objects_is_refused_by_their_ids(server, source):
    await server.modal("deploy", "greeter.py", cwd=source)
    layout = server.functions.layout(server.apps.deployed("greeter", "", CALLER).app_id)
    volume = server.functions.pool_settings(layout.functions["world"].function_id).volumes[0].volume_id
    server.known.missing = {volume}
    assert volume in await server.modal("deploy", "greeter.py", cwd=source, ok=False)


async def test_logs_are_shown_followed_searched_and_counted_by_the_cli(server, source):
    await server.modal("deploy", "greeter.py", cwd=source)
    app = server.apps.deployed("greeter", "", CALLER)
    hello = server.functions.layout(app.app_id).functions["hello"].function_id
    now = time.time()
    task_id = "ta-" + "0" * 22
    server.task_apps[task_id] = app.app_id
    lines = [LogLine(1 + n % 2, now - 100 + n, f"line {n}\n", "in-1", "fc-1") for n in range(90)]
    await server.logs.append(app.app_id, task_id, hello, lines)
    tail = await server.modal("app", "logs", "greeter", "--tail", "3")
    assert tail.split("\n")[:3] == ["line 87", "line 88", "line 89"]
    assert (await server.modal("app", "logs", "greeter", "--since", "1h")).count("line") == 90
    assert (await server.modal("app", "logs", "greeter", "--since", "1h", "--search", "line 8")).count("line") == 11
    assert (await server.modal("app", "logs", "greeter", "--since", "1h", "--source", "stderr")).count("line") == 45
    assert (await server.modal("function", "logs", "greeter/hello", "--since", "1h")).count("line") == 90
    assert (await server.modal("container", "logs", task_id, "--tail", "2")).count("line") == 2

    follower = await server.start(sys.executable, "-m", "modal", "app", "logs", "greeter", "-f")
    seen = b""
    while b"line 89" not in seen:
        seen += await asyncio.wait_for(follower.stdout.read(4096), 30)
    await server.logs.append(app.app_id, task_id, hello, [LogLine(1, time.time(), "live\n")])
    while b"live" not in seen:
        seen += await asyncio.wait_for(follower.stdout.read(4096), 30)
    await server.logs.append(app.app_id, task_id, hello, [LogLine(1, time.time(), "last words\n")])
    await server.modal("app", "stop", "greeter", "--yes")
    rest, _ = await asyncio.wait_for(follower.communicate(), 30)
    assert b"last words" in seen + rest and follower.returncode == 0


async def test_a_served_app_is_updated_in_place_when_its_file_changes(server, source):
    process = await server.start(sys.executable, "-m", "modal", "serve", "greeter.py", cwd=source)
    try:
        app = await until(lambda: next((app for app in server.apps.living_apps() if app.version), None))
        hello = server.functions.layout(app.app_id).functions["hello"].function_id
        await asyncio.sleep(1)  # the watcher starts after the app is up, and says nothing
        edit(source, "max_containers=3", "max_containers=5")
        await until(lambda: server.functions.pool_settings(hello).max_containers == 5)
        assert server.functions.layout(app.app_id).functions["hello"].function_id == hello
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.communicate(), 30)
        await until(lambda: server.apps.is_over(app.app_id))
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def until(condition, timeout=30.0):
    async with asyncio.timeout(timeout):
        while not (result := condition()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return result


async def test_what_cannot_be_done_is_refused_when_it_is_deployed(server, source):
    bucket = '"/bucket": modal.CloudBucketMount("some-bucket")'
    edit(source, "@app.function(volumes={", f"@app.function(volumes={{{bucket}, ")
    output = await server.modal("deploy", "greeter.py", cwd=source, ok=False)
    assert "Function 'world' uses cloud bucket mounts, which Aeolian does not support (yet)" in " ".join(output.split())


async def test_a_schedule_that_cannot_be_followed_is_refused_when_it_is_deployed(server, source):
    edit(source, "@app.function(volumes", "@app.function(schedule=modal.Cron('61 * * * *'), volumes")
    output = await server.modal("deploy", "greeter.py", cwd=source, ok=False)
    assert "Function 'world': the cron expression '61 * * * *' is not valid: its minute is wrong" in " ".join(
        output.split()
    )
