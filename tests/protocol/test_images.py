import asyncio
import contextlib
import json
import re

import grpc
import pytest
from image_server import ImageServer, output_of
from modal_proto import api_pb2

from aeolian.worker.hooks.base import Start

BUILD = """
import modal, sys
with modal.enable_output():
    image = modal.Image.from_registry("debian:12").run_commands(*sys.argv[1:])
    image.build()
print("id", image.object_id)
"""
SUCCESS = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS


@pytest.fixture
async def server(tmp_path):
    async with ImageServer(tmp_path / "data") as server:
        yield server


def id_in(output: str) -> str:
    return re.search(r"id (im-\w{22})", output)[1]


async def ask(stub, app_id: str, *commands: str, **options) -> api_pb2.ImageGetOrCreateResponse:
    return await stub.ImageGetOrCreate(
        api_pb2.ImageGetOrCreateRequest(
            app_id=app_id,
            image=api_pb2.Image(dockerfile_commands=["FROM debian:12", *commands]),
            builder_version="2025.06",
            **options,
        )
    )


async def join(stub, image_id: str, last_entry_id: str = "") -> tuple[str, str, api_pb2.ImageJoinStreamingResponse]:
    """Output, the last entry, and the message with the result."""
    text = ""
    async with asyncio.timeout(20):
        request = api_pb2.ImageJoinStreamingRequest(image_id=image_id, timeout=55, last_entry_id=last_entry_id)
        async for response in stub.ImageJoinStreaming(request):
            text += "".join(item.data for item in response.task_logs)
            last_entry_id = response.entry_id or last_entry_id
            if response.result.status:
                return text, last_entry_id, response
    raise AssertionError("no result came")


# ---- builds, by the official client ---------------------------------------------------------------------


async def test_a_client_sees_the_output_of_a_build_and_another_one_finds_the_image(server):
    output = await server.run("-c", BUILD, "SAY hello from the build")
    assert "hello from the build" in output
    num_built = len(server.builder.built)
    again = await server.run("-c", BUILD, "SAY hello from the build")
    assert id_in(again) == id_in(output) and len(server.builder.built) == num_built


async def test_two_clients_at_once_share_one_build_and_both_see_its_output(server):
    clients = [await server.start("-c", BUILD, "SAY shared", "WAIT") for _ in range(2)]
    for client in clients:
        async with asyncio.timeout(30):
            while not (await client.stdout.readline()).startswith(b"shared"):
                pass
    server.builder.go_on.set()
    assert len({id_in(await output_of(client)) for client in clients}) == 1
    assert len({image_id for image_id, *_ in server.builder.built}) == len(server.builder.built)


async def test_a_failing_step_is_shown_with_its_output_and_its_log_can_be_read_later(server):
    output = await server.run("-c", BUILD, "FAIL no such package", ok=False)
    assert "about to fail" in output
    assert "`RUN FAIL no such package` failed with exit code 1" in output
    failed = re.search(r"Image build for (im-\w+) failed", output)[1]
    assert "about to fail" in await server.modal("image", "logs", failed)


async def test_a_restart_of_the_server_in_the_middle_of_a_build_is_not_noticed(server):
    client = await server.start("-c", BUILD, "SAY before", "WAIT", "SAY after")
    await server.builder.waiting.wait()
    await server.stop_server()
    await server.start_server()
    server.builder.go_on.set()
    output = await output_of(client)
    assert output.count("before") == 1 + output.count("SAY before") and "after" in output
    assert len({image_id for image_id, *_ in server.builder.built}) == len(server.builder.built), "nothing twice"


async def test_a_worker_that_starts_anew_in_the_middle_of_a_build_builds_again(server):
    client = await server.start("-c", BUILD, "WAIT")
    await server.builder.waiting.wait()
    await server.stop_worker()
    server.builder.go_on.set()
    await server.start_worker()
    assert id_in(await output_of(client)) == server.builder.built[-1][0]


async def test_a_client_that_gives_up_ends_a_build_that_nobody_else_waits_for(server):
    client = await server.start("-c", BUILD, "WAIT")
    await server.builder.waiting.wait()
    client.terminate()
    await client.communicate()
    async with server.stub() as stub:
        for app in (await stub.AppList(api_pb2.AppListRequest())).apps:
            await stub.AppStop(api_pb2.AppStopRequest(app_id=app.app_id))
    await asyncio.wait_for(server.builder.cancelled.wait(), 10)


# ---- RPCs -----------------------------------------------------------------------------------------------


async def test_a_finished_image_is_answered_at_once_with_what_is_known_of_it(server):
    async with server.stub() as stub:
        app_id = await server.an_app(stub)
        image_id = (await ask(stub, app_id)).image_id
        _, _, end = await join(stub, image_id)
        reply = await ask(stub, app_id)
        assert reply.result.status == SUCCESS and reply.metadata == end.metadata
        assert reply.metadata.python_version_info == "Python 3.11.7"
        assert reply.metadata.image_builder_version == "2025.06"
        assert (reply.metadata.workdir, reply.metadata.libc_version_info) == ("/work", "glibc 2.36")
        assert dict(reply.metadata.python_packages) == {"pip": "1"}
        found = await stub.ImageFromId(api_pb2.ImageFromIdRequest(image_id=image_id))
        assert found.metadata == reply.metadata


async def test_a_join_goes_on_after_the_last_entry_that_the_client_has_seen(server):
    async with server.stub() as stub:
        image_id = (await ask(stub, await server.an_app(stub), "RUN SAY one")).image_id
        text, entry_id, _ = await join(stub, image_id)
        assert text == "one\n"
        text, _, end = await join(stub, image_id, entry_id)
        assert text == "" and end.result.status == SUCCESS


async def test_a_join_ends_without_a_result_when_its_time_is_over(server):
    async with server.stub() as stub:
        image_id = (await ask(stub, await server.an_app(stub), "RUN WAIT")).image_id
        request = api_pb2.ImageJoinStreamingRequest(image_id=image_id, timeout=0.1)
        assert [reply async for reply in stub.ImageJoinStreaming(request)] == []
        server.builder.go_on.set()
        assert (await join(stub, image_id))[2].result.status == SUCCESS


async def test_a_repeated_request_for_a_forced_build_is_one_build(server):
    async with server.stub() as stub:
        app_id = await server.an_app(stub)
        first = await ask(stub, app_id, force_build=True)
        await join(stub, first.image_id)
        assert (await ask(stub, app_id)).image_id == first.image_id
        assert (await ask(stub, app_id, force_build=True)).image_id != first.image_id


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        (lambda stub: stub.ImageFromId(api_pb2.ImageFromIdRequest(image_id="im-x")), "NOT_FOUND", "im-x"),
        (lambda stub: stub.ImageDelete(api_pb2.ImageDeleteRequest(image_id="im-x")), "NOT_FOUND", "im-x"),
        (lambda stub: stub.ImageBuildChainGet(api_pb2.ImageBuildChainGetRequest(image_id="x")), "NOT_FOUND", "'x'"),
        (lambda stub: stub.ImageGetByTag(api_pb2.ImageGetByTagRequest(tag="n:v")), "NOT_FOUND", "n:v"),
        (lambda stub: stub.ImageNameDelete(api_pb2.ImageNameDeleteRequest(tag="n:v")), "NOT_FOUND", "n:v"),
        (lambda stub: stub.ImagePublish(api_pb2.ImagePublishRequest(tag="n", image_id="im-x")), "NOT_FOUND", "im-x"),
        (
            lambda stub: stub.ImagePublish(api_pb2.ImagePublishRequest(tag="n", image_id="im-x", allow_public=True)),
            "INVALID_ARGUMENT",
            "public",
        ),
        (
            lambda stub: stub.ImageTagRevisions(api_pb2.ImageTagRevisionsRequest(tag="n", page_token="x")),
            "INVALID_ARGUMENT",
            "page token",
        ),
        (lambda stub: ask(stub, "ap-none"), "NOT_FOUND", "ap-none"),
    ],
)
async def test_what_does_not_exist_is_said(server, call, code, text):
    async with server.stub() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(stub)
        assert raised.value.code().name == code and text in raised.value.details()


async def test_publishing_an_image_that_failed_says_why_it_failed(server):
    async with server.stub() as stub:
        image_id = (await ask(stub, await server.an_app(stub), "RUN FAIL x")).image_id
        with pytest.raises(grpc.aio.AioRpcError, match="RUN FAIL x"):
            await stub.ImagePublish(api_pb2.ImagePublishRequest(tag="n", image_id=image_id))


# ---- names, by the official client ----------------------------------------------------------------------


async def test_images_are_published_found_listed_and_deleted_by_name(server):
    await server.modal("environment", "create", "dev")
    output = await server.run(
        "-c",
        """
import modal
image = modal.Image.from_registry("debian:12").build()
image.publish("tools")
image.publish("tools:v1", environment_name="dev")
app = modal.App.lookup("finder", create_if_missing=True)
found = modal.Image.from_name("tools:v1", environment_name="dev").build(app)
assert found.object_id == image.object_id
assert modal.Image.from_name("dev/tools:v1").build(app).object_id == image.object_id
print("id", image.object_id)
try:
    modal.Image.from_name("nothing").build(app)
except modal.exception.NotFoundError as error:
    print(error)
""",
    )
    image_id = id_in(output)
    assert "nothing:latest" in output and "main" in output
    listed = json.loads(await server.modal("image", "names", "list", "--json"))
    assert [(item["tag"], item["image_id"]) for item in listed] == [("tools:latest", image_id)]
    history = json.loads(await server.modal("image", "names", "history", "dev/tools:v1", "--json"))
    assert [item["image_id"] for item in history] == [image_id]
    await server.modal("image", "names", "delete", "--yes", "tools:latest")
    assert json.loads(await server.modal("image", "names", "list", "--json")) == []


async def test_images_are_pulled_and_built_by_the_cli(server, tmp_path):
    assert "Pulled docker.io/node:20" in await server.modal("image", "pull", "docker.io/node:20", "--name", "node:20")
    (tmp_path / "Dockerfile").write_text("FROM debian:12\nRUN SAY building\n")
    output = await server.modal("image", "build", "-t", "mine", str(tmp_path))
    assert "building" in output and "mine:latest" in output
    listed = json.loads(await server.modal("image", "names", "list", "--json"))
    assert [item["tag"] for item in listed] == ["mine:latest", "node:20"]


async def test_the_output_of_all_layers_can_be_read_later(server):
    output = await server.run(
        "-c",
        """
import modal
image = modal.Image.from_registry("debian:12").run_commands("SAY first").run_commands("SAY second").build()
print("id", image.object_id)
""",
    )
    logs = await server.modal("image", "logs", id_in(output), "--all")
    assert logs.index("first") < logs.index("second")
    assert "first" not in await server.modal("image", "logs", id_in(output))


async def test_a_deleted_image_is_not_found(server):
    output = await server.run(
        "-c",
        """
import modal, modal.experimental
image = modal.Image.from_registry("debian:12").build()
modal.experimental.image_delete(image.object_id)
try:
    modal.Image.from_id(image.object_id).build(modal.App.lookup("a", create_if_missing=True))
except modal.exception.NotFoundError as error:
    print(error)
""",
    )
    assert "it was deleted" in output


# ---- build functions ------------------------------------------------------------------------------------

RUN_FUNCTION = """
import modal

def fill():
    print("this runs elsewhere")

with modal.enable_output():
    image = modal.Image.from_registry("debian:12").run_function(fill, args=(1,), timeout=7)
    image.build()
print("id", image.object_id)
"""


def a_container(status=SUCCESS, *, before_output=None, **result):
    """The program of a container that takes one input, writes a file and says how it went."""

    async def main(stub, start: Start, stdout: asyncio.StreamReader) -> int:
        reply = await stub.FunctionGetInputs(api_pb2.FunctionGetInputsRequest())
        item = reply.inputs[0]
        assert item.input.final_input and item.input.args
        stdout.feed_data(b"filling\n")
        (start.upper / "made.txt").write_text(start.spec.image_id)
        if before_output is not None:
            await before_output()
        output = api_pb2.FunctionPutOutputsItem(
            input_id=item.input_id, result=api_pb2.GenericResult(status=status, **result)
        )
        await stub.FunctionPutOutputs(api_pb2.FunctionPutOutputsRequest(outputs=[output]))
        return 0

    return main


async def test_a_function_runs_once_on_its_base_and_what_it_wrote_is_the_image(tmp_path):
    (tmp_path / "build.py").write_text(RUN_FUNCTION)
    async with ImageServer(tmp_path / "data", a_container()) as server:
        output = await server.run("build.py", cwd=tmp_path)
        image = server.store.get(id_in(output))
        assert "filling" in output
        base_id = server.builder.built[-1][0]
        assert (server.store.layers_folder / image.layers[-1] / "made.txt").read_text() == base_id
        assert "filling" in await server.modal("image", "logs", image.image_id)
        again = await server.run("build.py", cwd=tmp_path)
        assert id_in(again) == image.image_id and "filling" not in again
        async with server.stub() as stub:
            found = await stub.ImageFromId(api_pb2.ImageFromIdRequest(image_id=image.image_id))
            assert found.metadata.python_version_info == "Python 3.11.7"


async def test_a_build_function_that_raises_shows_its_traceback_and_leaves_no_image(tmp_path):
    (tmp_path / "build.py").write_text(RUN_FUNCTION)
    failure = a_container(
        api_pb2.GenericResult.GENERIC_STATUS_FAILURE,
        exception="ValueError('no')",
        traceback='Traceback:\n  File "build.py", line 5, in fill\nValueError: no\n',
    )
    async with ImageServer(tmp_path / "data", failure) as server:
        output = await server.run("build.py", cwd=tmp_path, ok=False)
        assert "line 5, in fill" in output and "ValueError: no" in output
        assert server.store.ids() == [image_id for image_id, *_ in server.builder.built]


async def test_a_restart_of_the_server_does_not_run_a_build_function_twice(tmp_path):
    (tmp_path / "build.py").write_text(RUN_FUNCTION)
    starts = []

    async def restart() -> None:
        starts.append(1)
        await server.stop_server()
        await server.start_server()

    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(ImageServer(tmp_path / "data", a_container(before_output=restart)))
        output = await server.run("build.py", cwd=tmp_path)
        assert server.store.has(id_in(output)) and starts == [1]
