"""Looking into running containers: `modal container list|logs|exec|stop`, `modal shell`, and what they stand on."""

import shlex
import sys
import time

import pytest
from terminal import Terminal

APP = """
    import modal

    app = modal.App("inspected")

    @app.function(min_containers=1, secrets=[modal.Secret.from_dict({"OWN_SECRET": "tell-nobody"})])
    def f(text):
        print("called with", text, flush=True)
        return text
"""
NOT_FROM_HERE = """
import asyncio
from modal.client import _Client
from modal_proto import api_pb2

async def main():
    client = await _Client.from_env()
    try:
        await client._stub.TaskGetCommandRouterAccess(api_pb2.TaskGetCommandRouterAccessRequest(task_id=%r))
    except Exception as error:
        print(type(error).__name__)

asyncio.run(main())
"""
PROCESSES = """
    import io
    import sys
    import time
    import uuid

    from modal._utils.async_utils import synchronizer
    from modal.client import _Client
    from modal.container_process import _ContainerProcess
    from modal.sandbox._impl_v1 import command_router_access_fetcher
    from modal.sandbox._task_command_router_client import TaskCommandRouterClient
    from modal_proto import task_command_router_pb2 as pb

    task_id = sys.argv[1]
    PIPE = dict(
        stdout_config=pb.TaskExecStdoutConfig.TASK_EXEC_STDOUT_CONFIG_PIPE,
        stderr_config=pb.TaskExecStderrConfig.TASK_EXEC_STDERR_CONFIG_PIPE,
    )

    @synchronizer.create_blocking
    async def main():
        client = await _Client.from_env()
        router = await TaskCommandRouterClient.connect(client, task_id, command_router_access_fetcher(client, task_id))

        async def start(*argv, **options):
            exec_id = str(uuid.uuid4())
            request = pb.TaskExecStartRequest(task_id=task_id, exec_id=exec_id, command_args=argv, **PIPE, **options)
            await router.exec_start(request)
            await router.exec_start(request)
            return _ContainerProcess(exec_id, task_id, client, router)

        process = await start("sh", "-c", "cat; echo $MORE; pwd; exit 7", env={"MORE": "more"}, workdir="/tmp")
        assert await process.poll() is None
        process.stdin.write(b"typed\\n")
        await process.stdin.drain()
        process.stdin.write_eof()
        await process.stdin.drain()
        print("read", repr(await process.stdout.read()), await process.wait(), await process.poll())

        process = await start("sh", "-c", "wc -c")
        print("streamed", await process._stdin_write_stream(io.BytesIO(bytes(3_000_000))))
        print("counted", (await process.stdout.read()).strip())

        began = time.monotonic()
        process = await start("sleep", "600", timeout_secs=1)
        print("killed", await process.wait(), time.monotonic() - began < 60)

        await router.reload_volumes(task_id, 20)
        for name, argv, options in (("argument", ["a\\0b"], {}), ("secret", ["true"], {"secret_ids": ["st-none"]})):
            try:
                await start(*argv, **options)
            except Exception as error:
                print("refused", name, type(error).__name__)
        try:
            await router._call_with_auth_retry(router._stub.SandboxWaitUntilReady, pb.SandboxWaitUntilReadyRequest())
        except Exception as error:
            print("refused", type(error).__name__, error)
        await router.close()

    main()
"""


@pytest.fixture(scope="module")
def app(aeolian, tmp_path_factory):
    """(running Aeolian, a folder for programs) with one container that stays."""
    folder = tmp_path_factory.mktemp("inspected")
    aeolian.deploy(APP, folder)
    yield aeolian, folder
    aeolian.modal("app", "stop", "inspected", "-y")


def containers(aeolian) -> list[dict]:
    return [one for one in aeolian.modal_json("container", "list") if one["app_name"] == "inspected"]


def container(aeolian, but_not: str = "", timeout_s: float = 60.0) -> str:
    """The id of the one that is up."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        up = [one["container_id"] for one in containers(aeolian) if one["start_time"] != "Pending"]
        if others := [task_id for task_id in up if task_id != but_not]:
            return others[0]
    raise AssertionError("no container is up")


def test_a_container_is_listed_looked_into_and_read(app):
    aeolian, folder = app
    aeolian.python("import modal; print(modal.Function.from_name('inspected', 'f').remote('words'))", folder)
    task_id = container(aeolian)
    script = "echo out; echo problem >&2; echo $OWN_SECRET $MODAL_TASK_ID; pwd"
    inside = NOT_FROM_HERE % task_id
    printed = aeolian.modal_session(
        (f"container exec --no-pty {task_id} -- sh -c {shlex.quote(script)}", "problem"),
        (f"container exec --no-pty {task_id} -- python -c {shlex.quote(inside)}", "PermissionDenied"),
        (f"container exec --no-pty {task_id} -- head -c 20000000 /dev/zero", "\0" * 20_000_000),
        (f"container exec --no-pty {task_id} -- no-such-command", "no-such-command"),
        (f"container logs {task_id}", "called with words"),
    )
    assert set(printed[0].split()) == {"out", "problem", "tell-nobody", task_id, "/root"}


def test_commands_take_input_have_limits_and_tell_how_they_ended(app):
    aeolian, folder = app
    printed = aeolian.python(PROCESSES, folder, args=(container(aeolian),)).splitlines()
    assert printed[:4] == [
        r"read 'typed\nmore\n/tmp\n' 7 7",
        "streamed 3000000",
        "counted 3000000",
        "killed 137 True",
    ]
    assert printed[4:6] == ["refused argument InvalidError", "refused secret NotFoundError"]


def test_a_shell_in_a_container_goes_on_while_the_server_starts_anew(app):
    aeolian, folder = app
    task_id = container(aeolian)
    command = [sys.executable, "-m", "modal", "shell", task_id, "--cmd", "sh"]
    terminal = Terminal(command, aeolian.environment, cwd=folder)
    try:
        terminal.until("# ")
        terminal.type("echo size $(stty size) $TERM in $MODAL_TASK_ID; test -t 0 && echo is a ter''minal\n")
        shown = terminal.until("is a terminal\r\n")
        assert "size 30 100 xterm-256color" in shown and f"in {task_id}" in shown
        terminal.type("sleep 600\n")
        time.sleep(0.5)
        terminal.type("\x03echo interru''pted\n")
        terminal.until("interrupted\r\n")
        aeolian.kill("server")
        terminal.type("echo survi''ved\n")
        terminal.until("survived\r\n")
        terminal.type("exit\n")
        assert terminal.ended() == 0
    finally:
        terminal.close()


def test_a_stopped_container_takes_its_commands_along_and_another_takes_its_place(app):
    aeolian, folder = app
    task_id = container(aeolian)
    command = [sys.executable, "-m", "modal", "container", "exec", task_id, "sh"]
    terminal = Terminal(command, aeolian.environment, cwd=folder)
    try:
        terminal.until("# ")
        terminal.type("echo rea''dy\n")
        terminal.until("ready\r\n")
        aeolian.modal("container", "stop", task_id, "-y")
        assert terminal.ended() == 0
    finally:
        terminal.close()
    aeolian.modal_session(
        (f"! container exec --no-pty {task_id} -- true", "there is no running container"),
        (f"! container stop {task_id} -y", "already stopped"),
    )
    assert container(aeolian, but_not=task_id)
