"""A request whose reply was lost when the server was killed is sent again: its work is done once."""

import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from google.protobuf.message import Message
from modal_proto import api_pb2
from whole_server import WholeServer, new_key, whole_server

from aeolian.domain.link import BuildImage, ImageBuilt
from aeolian.protocol.service import REPEATABLE

FAIL = api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS
OVERWRITE = api_pb2.OBJECT_CREATION_TYPE_CREATE_OVERWRITE_IF_EXISTS
CREATE = api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING
EPHEMERAL = api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL
ASYNC = api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC
MAP, UNARY = api_pb2.FUNCTION_CALL_TYPE_MAP, api_pb2.FUNCTION_CALL_TYPE_UNARY

Prepare = Callable[[WholeServer], Awaitable[Message]]


class Case(NamedTuple):
    name: str
    prepare: Prepare
    """Makes what the request needs, and the request."""
    what: str = ""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    yield folder / "data"
    shutil.rmtree(folder)


async def id_of(server: WholeServer, noun: str, **fields) -> str:
    request = getattr(api_pb2, f"{noun}GetOrCreateRequest")(
        **{"deployment_name": "one", "object_creation_type": CREATE, **fields}
    )
    return getattr((await server.call(f"{noun}GetOrCreate", request)).message, f"{noun.lower()}_id")


def ready(request: Message) -> Prepare:
    async def prepare(server: WholeServer) -> Message:
        return request

    return prepare


def put(*idxs: int) -> list[api_pb2.FunctionPutInputsItem]:
    return [api_pb2.FunctionPutInputsItem(idx=idx, input=api_pb2.FunctionInput(args=b"%d" % idx)) for idx in idxs]


async def a_call(server: WholeServer) -> api_pb2.FunctionMapResponse:
    _, function_id = await server.deploy()
    request = api_pb2.FunctionMapRequest(
        function_id=function_id,
        function_call_type=MAP,
        function_call_invocation_type=ASYNC,
        pipelined_inputs=put(0),
    )
    return (await server.call("FunctionMap", request)).message


async def an_image(server: WholeServer) -> str:
    app_id, _ = await server.deploy()
    worker = await server.worker()
    request = api_pb2.ImageGetOrCreateRequest(
        app_id=app_id, image=api_pb2.Image(dockerfile_commands=["FROM debian"]), builder_version="2025.06"
    )
    image_id = (await server.call("ImageGetOrCreate", request)).message.image_id
    command = await worker.told(BuildImage)
    worker.send(ImageBuilt(image_id, build_id=command.build_id))
    await server.call("ImageFromId", api_pb2.ImageFromIdRequest(image_id=image_id))
    return image_id


# ---- what is repeated ---------------------------------------------------------------------------------------


async def create_app(server):
    return api_pb2.AppCreateRequest(description="run", app_state=api_pb2.APP_STATE_EPHEMERAL)


async def publish_app(server):
    app_id, function_id = await server.deploy()
    return api_pb2.AppPublishRequest(
        app_id=app_id, name="app", app_state=api_pb2.APP_STATE_DEPLOYED, function_ids={"f": function_id}
    )


async def stop_app(server):
    return api_pb2.AppStopRequest(app_id=(await server.deploy())[0], source=api_pb2.APP_STOP_SOURCE_CLI)


async def set_app_tags(server):
    return api_pb2.AppSetTagsRequest(app_id=(await server.deploy())[0], tags={"team": "a"})


async def disconnect(server):
    request = api_pb2.AppCreateRequest(description="run", app_state=api_pb2.APP_STATE_EPHEMERAL)
    return api_pb2.AppClientDisconnectRequest(app_id=(await server.call("AppCreate", request)).message.app_id)


async def create_function(server):
    app_id, _ = await server.deploy()
    return api_pb2.FunctionCreateRequest(
        app_id=app_id,
        function=api_pb2.Function(
            function_name="g", module_name="user", function_type=api_pb2.Function.FUNCTION_TYPE_FUNCTION
        ),
    )


async def precreate_function(server):
    app_id, _ = await server.deploy()
    return api_pb2.FunctionPrecreateRequest(
        app_id=app_id, function_name="g", function_type=api_pb2.Function.FUNCTION_TYPE_FUNCTION
    )


async def bind_params(server):
    _, function_id = await server.deploy()
    return api_pb2.FunctionBindParamsRequest(
        function_id=function_id, function_options=api_pb2.FunctionOptions(timeout_secs=7)
    )


async def rescale(server):
    _, function_id = await server.deploy()
    return api_pb2.FunctionUpdateSchedulingParamsRequest(
        function_id=function_id, settings=api_pb2.AutoscalerSettings(max_containers=3)
    )


async def start_call(server):
    _, function_id = await server.deploy()
    return api_pb2.FunctionMapRequest(
        function_id=function_id,
        function_call_type=UNARY,
        function_call_invocation_type=ASYNC,
        pipelined_inputs=put(0),
    )


async def put_inputs(server):
    call = await a_call(server)
    return api_pb2.FunctionPutInputsRequest(function_call_id=call.function_call_id, inputs=put(1, 2))


async def finish_inputs(server):
    call = await a_call(server)
    return api_pb2.FunctionFinishInputsRequest(function_call_id=call.function_call_id, num_inputs=1)


async def retry_inputs(server):
    call = await a_call(server)
    await server.call("FunctionCallCancel", api_pb2.FunctionCallCancelRequest(function_call_id="fc-none"))
    item = api_pb2.FunctionRetryInputsItem(
        input_jwt=call.pipelined_inputs[0].input_jwt, input=put(0)[0].input, retry_count=1
    )
    return api_pb2.FunctionRetryInputsRequest(function_call_jwt=call.function_call_jwt, inputs=[item])


async def cancel_call(server):
    return api_pb2.FunctionCallCancelRequest(function_call_id=(await a_call(server)).function_call_id)


async def put_item(server):
    return api_pb2.QueuePutRequest(queue_id=await id_of(server, "Queue"), values=[b"x"])


async def take_item(server):
    queue_id = await id_of(server, "Queue")
    await server.call("QueuePut", api_pb2.QueuePutRequest(queue_id=queue_id, values=[b"1", b"2"]))
    return api_pb2.QueueGetRequest(queue_id=queue_id, n_values=1, timeout=1)


async def clear_queue(server):
    return api_pb2.QueueClearRequest(queue_id=await id_of(server, "Queue"), all_partitions=True)


async def pop(server):
    dict_id = await id_of(server, "Dict", data=[api_pb2.DictEntry(key=b"k", value=b"v")])
    return api_pb2.DictPopRequest(dict_id=dict_id, key=b"k")


async def put_if_new(server):
    return api_pb2.DictUpdateRequest(
        dict_id=await id_of(server, "Dict"), updates=[api_pb2.DictEntry(key=b"k", value=b"v")], if_not_exists=True
    )


async def clear_dict(server):
    return api_pb2.DictClearRequest(dict_id=await id_of(server, "Dict"))


def delete(noun: str) -> Prepare:
    async def prepare(server):
        return getattr(api_pb2, f"{noun}DeleteRequest")(**{f"{noun.lower()}_id": await id_of(server, noun)})

    return prepare


async def update_secret(server):
    return api_pb2.SecretUpdateRequest(
        secret_id=await id_of(server, "Secret"), updates=[api_pb2.SecretUpdateRequest.Update(key="A", value="1")]
    )


async def rename_volume(server):
    return api_pb2.VolumeRenameRequest(volume_id=await id_of(server, "Volume"), name="two")


async def remove_file(server):
    volume_id = await id_of(server, "Volume", version=2)
    files = [api_pb2.VolumePutFiles2Request.File(path="a.txt", size=0)]
    reply = await server.call("VolumePutFiles2", api_pb2.VolumePutFiles2Request(volume_id=volume_id, files=files))
    assert reply.code is grpc.StatusCode.OK, reply.text
    return api_pb2.VolumeRemoveFile2Request(volume_id=volume_id, path="a.txt")


async def update_environment(server):
    await server.call("EnvironmentCreate", api_pb2.EnvironmentCreateRequest(name="dev"))
    request = api_pb2.EnvironmentUpdateRequest(current_name="dev")
    request.name.value = "test"
    return request


async def delete_environment(server):
    await server.call("EnvironmentCreate", api_pb2.EnvironmentCreateRequest(name="dev"))
    return api_pb2.EnvironmentDeleteRequest(name="dev")


async def delete_token(server):
    token_id, _ = await server.services.tokens.create("other", "local")
    return api_pb2.TokenDeleteRequest(token_id=token_id)


async def delete_service_user(server):
    await server.call("ServiceUserCreate", api_pb2.ServiceUserCreateRequest(name="bot"))
    return api_pb2.ServiceUserDeleteRequest(service_user_name="bot")


async def publish_image(server):
    return api_pb2.ImagePublishRequest(image_id=await an_image(server), tag="mine:1")


async def delete_image_name(server):
    await server.call("ImagePublish", await publish_image(server))
    return api_pb2.ImageNameDeleteRequest(tag="mine:1")


async def delete_image(server):
    return api_pb2.ImageDeleteRequest(image_id=await an_image(server))


CASES = [
    Case("AppCreate", create_app),
    Case("AppGetOrCreate", ready(api_pb2.AppGetOrCreateRequest(app_name="new", object_creation_type=FAIL))),
    Case("AppPublish", publish_app),
    Case("AppSetTags", set_app_tags),
    Case("AppStop", stop_app),
    Case("AppClientDisconnect", disconnect),
    Case("FunctionCreate", create_function),
    Case("FunctionPrecreate", precreate_function),
    Case("FunctionBindParams", bind_params),
    Case("FunctionUpdateSchedulingParams", rescale),
    Case("FunctionMap", start_call),
    Case("FunctionPutInputs", put_inputs),
    Case("FunctionFinishInputs", finish_inputs),
    Case("FunctionRetryInputs", retry_inputs),
    Case("FunctionCallCancel", cancel_call),
    Case("QueuePut", put_item),
    Case("QueueGet", take_item),
    Case("QueueClear", clear_queue),
    Case("DictPop", pop),
    Case("DictUpdate", put_if_new),
    Case("DictClear", clear_dict),
    *(Case(f"{noun}Delete", delete(noun)) for noun in ("Dict", "Queue", "Secret", "Volume")),
    *(
        Case(
            f"{noun}GetOrCreate",
            ready(
                getattr(api_pb2, f"{noun}GetOrCreateRequest")(
                    deployment_name="" if kind == EPHEMERAL else "new", object_creation_type=kind
                )
            ),
            api_pb2.ObjectCreationType.Name(kind).removeprefix("OBJECT_CREATION_TYPE_"),
        )
        for noun in ("Dict", "Queue", "Secret", "Volume")
        for kind in (FAIL, OVERWRITE, CREATE, EPHEMERAL)
    ),
    Case("SecretUpdate", update_secret),
    Case("VolumeRename", rename_volume),
    Case("VolumeRemoveFile2", remove_file),
    Case("EnvironmentCreate", ready(api_pb2.EnvironmentCreateRequest(name="dev"))),
    Case("EnvironmentUpdate", update_environment),
    Case("EnvironmentDelete", delete_environment),
    Case("TokenDelete", delete_token),
    Case("ServiceUserCreate", ready(api_pb2.ServiceUserCreateRequest(name="bot"))),
    Case("ServiceUserDelete", delete_service_user),
    Case("WebhookTokenCreate", ready(api_pb2.WebhookTokenCreateRequest(name="site"))),
    Case("ImagePublish", publish_image),
    Case("ImageNameDelete", delete_image_name),
    Case("ImageDelete", delete_image),
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=" ".join(filter(None, (case.name, case.what)))) for case in CASES]
)
async def test_a_request_that_is_repeated_after_a_restart_gets_the_same_reply(data_dir, case):
    key = new_key()
    async with whole_server(data_dir) as server:
        request = await case.prepare(server)
        first = await server.call(case.name, request, key=key)
        assert first.code is grpc.StatusCode.OK, first.text
    async with whole_server(data_dir) as server:
        again = await server.call(case.name, request, key=key)
        assert again.code is grpc.StatusCode.OK, again.text
        assert again.messages == first.messages


def test_whatever_is_repeated_is_tried():
    without_harm = {
        "AppPromote", "AppRollback", "AppRollover",  # as AppPublish
        "BlobCreate", "ClassCreate", "ContainerStop", "EnvironmentGetOrCreate", "EnvironmentRoleSet",
        "FunctionCallPutDataOut",
        "ImageGetOrCreate", "MountGetOrCreate", "MountPutFile", "TaskResult", "TokenDisable", "TokenEnable",
        "TokenFlowCreate", "VolumeCommit", "VolumeCopyFiles", "VolumeCopyFiles2", "VolumePutFiles", "VolumePutFiles2",
        "VolumeRemoveFile",
    }  # fmt: skip
    assert REPEATABLE - {case.name for case in CASES} == without_harm
