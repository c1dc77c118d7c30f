"""What tokens with roles, and containers that are shut in or shut off, may do: over every RPC that is built."""

from typing import Any

import grpc
import sqlalchemy as sa
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from modal_proto import api_pb2
from whole_server import METHODS, WholeServer, whole_server

from aeolian.domain.roles import RULES, Right, Role
from aeolian.storage.tables import metadata

OK, DENIED, ABSENT = grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND
CREATE = api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING
WAITS_S = 0.5
NOT_CHANGES = {"audit", "replies", "log_batches", "alembic_version"}
READS = {rule for rule in RULES if RULES[rule].right in (Right.ANY, Right.READ)}
Metadata = tuple[tuple[str, str], ...]


async def token_with(server: WholeServer, **roles: Role) -> Metadata:
    environments = {one.name: one.id for one in server.services.environments.all()}
    given = {environments[name]: role for name, role in roles.items()}
    token_id, secret = await server.services.tokens.create("limited", "local", roles=given)
    await server.services.environments.refresh()
    return (("x-modal-token-id", token_id), ("x-modal-token-secret", secret))


class Things:
    """One of each noun in an environment, and requests that name them."""

    def __init__(self, environment: str):
        self.environment = environment
        self.values: dict[str, str] = {"environment_name": environment}

    async def make(self, server: WholeServer) -> "Things":
        values = self.values
        values["app_id"], values["function_id"] = await server.deploy("app", "f", self.environment)
        call = await server.call(
            "FunctionMap",
            api_pb2.FunctionMapRequest(
                function_id=values["function_id"],
                function_call_type=api_pb2.FUNCTION_CALL_TYPE_UNARY,
                function_call_invocation_type=api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC,
                pipelined_inputs=[api_pb2.FunctionPutInputsItem(input=api_pb2.FunctionInput(args=b"x"))],
            ),
        )
        values["function_call_id"] = call.message.function_call_id
        values["function_call_jwt"] = call.message.function_call_jwt
        values["input_jwt"] = call.message.pipelined_inputs[0].input_jwt
        for noun in ("Dict", "Queue", "Secret", "Volume"):
            kind = GetMessageClass(METHODS[f"{noun}GetOrCreate"].input_type)
            request = kind(deployment_name="one", environment_name=self.environment, object_creation_type=CREATE)
            made = await server.call(f"{noun}GetOrCreate", request)
            values[f"{noun.lower()}_id"] = getattr(made.message, f"{noun.lower()}_id")
        found = await server.call(
            "EnvironmentGetOrCreate", api_pb2.EnvironmentGetOrCreateRequest(deployment_name=self.environment)
        )
        values["environment_id"] = found.message.environment_id
        values["object_id"] = values["secret_id"]
        values["secret_ids"] = values["secret_id"]
        values["environment_ids"], values["app_ids"] = values["environment_id"], values["app_id"]
        values["existing_function_id"] = values["parametrized_function_id"] = values["function_id"]
        return self

    def request(self, name: str) -> Message:
        """A request that names these things wherever it can, and everything else plausibly."""
        message = self._fill(METHODS[name].input_type, 0)
        if name == "EnvironmentGetOrCreate":
            message.deployment_name = self.environment
        if name == "EnvironmentUpdate":
            message.current_name = self.environment
        if name == "EnvironmentDelete":
            message.name = self.environment
        if "tag" in METHODS[name].input_type.fields_by_name and name.startswith("Image"):
            message.tag = f"{self.environment}/one:latest"
        return message

    def _fill(self, descriptor, depth: int) -> Any:
        message = GetMessageClass(descriptor)()
        for field in descriptor.fields:
            if field.message_type is not None:
                if depth < 2 and not field.message_type.GetOptions().map_entry and field.containing_oneof is None:
                    inner = self._fill(field.message_type, depth + 1)
                    if field.is_repeated:
                        getattr(message, field.name).append(inner)
                    else:
                        getattr(message, field.name).CopyFrom(inner)
            elif field.type == FieldDescriptor.TYPE_STRING:
                text = self.values.get(field.name, "" if field.name.endswith(("_id", "_ids")) else "new")
                if text and field.is_repeated:
                    getattr(message, field.name).append(text)
                elif text and not field.is_repeated and field.containing_oneof is None:
                    setattr(message, field.name, text)
            elif field.name == "object_creation_type":
                message.object_creation_type = CREATE
            elif field.name == "clear_on_success":
                message.clear_on_success = True
        return message


def content(server: WholeServer) -> dict[str, list]:
    """Everything that the database holds, but for what each request leaves behind."""

    def read(connection: sa.Connection) -> dict[str, list]:
        found = {}
        for table in metadata.sorted_tables:
            if table.name not in NOT_CHANGES:
                columns = [column for column in table.columns if column.name not in ("last_used_at", "expires_at")]
                found[table.name] = sorted(map(repr, connection.execute(sa.select(*columns))))
        return found

    return server.services.database.read_now(read)


async def test_a_viewers_token_changes_nothing_with_any_rpc(tmp_path):
    async with whole_server(tmp_path) as server:
        things = await Things("main").make(server)
        token = await token_with(server, main=Role.VIEWER)
        await server.call("TokenInfoGet", metadata=token)
        await server.services.calls.flush()
        before = content(server)
        wrong = {}
        for name in sorted(server.built):
            if name in ("TokenDelete", "TokenFlowCreate", "TokenFlowWait"):
                continue
            reply = await server.call(name, things.request(name), metadata=token, timeout_s=WAITS_S)
            if name not in READS and reply.code not in (DENIED, ABSENT):
                wrong[name] = (reply.code, reply.text)
        assert wrong == {}
        assert content(server) == before
        for name in ("DictClear", "AppStop", "SecretDelete", "VolumeDelete", "EnvironmentRoleSet"):
            await server.call(name, things.request(name))
        assert content(server) != before  # the same requests of somebody else do change it


async def test_a_token_for_one_environment_learns_nothing_of_another_and_changes_nothing_there(tmp_path):
    async with whole_server(tmp_path) as server:
        await server.call("EnvironmentCreate", api_pb2.EnvironmentCreateRequest(name="dev"))
        things = await Things("main").make(server)
        token = await token_with(server, dev=Role.MANAGER)
        await server.call("TokenInfoGet", metadata=token)
        await server.services.calls.flush()
        before = content(server)
        reached = {}
        for name in sorted(server.built):
            rule = RULES[name]
            if rule.right is Right.ANY or rule.anywhere:
                continue
            reply = await server.call(name, things.request(name), metadata=token, timeout_s=WAITS_S)
            if reply.code is not DENIED:
                reached[name] = (reply.code, reply.text)
        assert {name: end for name, end in reached.items() if end[0] is not ABSENT} == {}
        assert content(server) == before
        listed = (await server.call("EnvironmentList", metadata=token)).message
        assert [item.name for item in listed.items] == ["dev"]
        assert len((await server.call("TokensList", metadata=token)).message.tokens) == 1


async def test_ids_of_another_environment_are_found_wherever_a_request_hides_them(tmp_path):
    async with whole_server(tmp_path) as server:
        await server.call("EnvironmentCreate", api_pb2.EnvironmentCreateRequest(name="dev"))
        main, dev = await Things("main").make(server), await Things("dev").make(server)
        token = await token_with(server, dev=Role.CONTRIBUTOR, main=Role.VIEWER)

        def function(secret_id: str) -> api_pb2.FunctionCreateRequest:
            message = api_pb2.Function(
                function_name="g",
                module_name="user",
                function_type=api_pb2.Function.FUNCTION_TYPE_FUNCTION,
                definition_type=api_pb2.Function.DEFINITION_TYPE_FILE,
                timeout_secs=300,
                secret_ids=[secret_id],
            )
            return api_pb2.FunctionCreateRequest(app_id=dev.values["app_id"], function=message)

        own = await server.call("FunctionCreate", function(dev.values["secret_id"]), metadata=token)
        assert own.code is OK, own.text
        stolen = await server.call("FunctionCreate", function(main.values["secret_id"]), metadata=token)
        assert stolen.code is DENIED and "contributor of environment 'main'" in stolen.text
        looked_up = api_pb2.AppGetOrCreateRequest(app_name=main.values["app_id"], environment_name="dev")
        blind = await token_with(server, dev=Role.MANAGER)
        assert (await server.call("AppGetOrCreate", looked_up, metadata=blind)).code is DENIED
        retried = api_pb2.FunctionRetryInputsRequest(function_call_jwt=main.values["function_call_jwt"])
        assert (await server.call("FunctionRetryInputs", retried, metadata=token)).code is DENIED


async def test_whoever_has_deleted_something_is_told_so_again_after_a_restart(tmp_path):
    async with whole_server(tmp_path) as server:
        things = await Things("main").make(server)
        token, delete = await token_with(server, main=Role.CONTRIBUTOR), things.request("DictDelete")
        assert (await server.call("DictDelete", delete, metadata=token, key="key-1")).code is OK
    async with whole_server(tmp_path) as server:
        assert (await server.call("DictDelete", delete, metadata=token, key="key-1")).code is OK
        assert (await server.call("DictDelete", delete, metadata=token, key="key-2")).code is ABSENT


async def test_each_role_may_do_what_it_is_for(tmp_path):
    async with whole_server(tmp_path) as server:
        things = await Things("main").make(server)
        viewer, contributor, manager = [
            await token_with(server, main=role) for role in (Role.VIEWER, Role.CONTRIBUTOR, Role.MANAGER)
        ]
        names = {
            "DictGetById": (viewer, contributor, manager),
            "AppGetInfo": (viewer, contributor, manager),
            "DictClear": (contributor, manager),
            "EnvironmentGetRoles": (viewer, contributor, manager),
        }
        for name, allowed in names.items():
            for token in (viewer, contributor, manager):
                code = (await server.call(name, things.request(name), metadata=token)).code
                assert code is (OK if token in allowed else DENIED), name
        renamed = api_pb2.EnvironmentUpdateRequest(current_name="main", image_builder_version="2025.06")
        codes = [(await server.call("EnvironmentUpdate", renamed, metadata=t)).code for t in (contributor, manager)]
        assert codes == [DENIED, OK]
        looked_up = api_pb2.DictGetOrCreateRequest(deployment_name="one", environment_name="main")
        assert (await server.call("DictGetOrCreate", looked_up, metadata=viewer)).code is OK
        more = api_pb2.EnvironmentUpdateRequest(current_name="main", max_concurrent_tasks=99)
        assert (await server.call("EnvironmentUpdate", more, metadata=manager)).code is DENIED


async def test_a_container_of_a_restricted_environment_stays_inside(tmp_path):
    async with whole_server(tmp_path) as server:
        await server.call("EnvironmentCreate", api_pb2.EnvironmentCreateRequest(name="dev"))
        main, dev = await Things("main").make(server), await Things("dev").make(server)
        worker = await server.worker()
        tasks = {}
        for _ in range(2):
            task_id = await worker.started()
            container = server.services.containers.get(task_id)
            tasks[container.app_id] = worker.as_container(task_id)
        inside = tasks[dev.values["app_id"]]
        read = main.request("DictGetById")
        assert (await server.call("DictGetById", read, metadata=inside)).code is OK
        await token_with(server, dev=Role.CONTRIBUTOR)
        refused = await server.call("DictGetById", read, metadata=inside)
        assert refused.code is DENIED and "stay inside" in refused.text
        assert (await server.call("DictClear", dev.request("DictClear"), metadata=inside)).code is OK
        outside = tasks[main.values["app_id"]]
        assert (await server.call("DictGetById", dev.request("DictGetById"), metadata=outside)).code is OK
        for name in ("EnvironmentDelete", "TokenDisable", "ServiceUserCreate"):
            assert (await server.call(name, dev.request(name), metadata=outside)).code is DENIED


async def test_containers_are_shut_in_before_the_first_change_by_a_token_that_another_process_made(tmp_path):
    async with whole_server(tmp_path) as server:
        things = await Things("main").make(server)
        main = server.services.environments.default.id
        token_id, secret = await server.services.tokens.create("new", "local", roles={main: Role.CONTRIBUTOR})
        token = (("x-modal-token-id", token_id), ("x-modal-token-secret", secret))
        assert not server.services.environments.is_restricted(main)  # as it was a moment ago
        assert (await server.call("DictClear", things.request("DictClear"), metadata=token)).code is OK
        assert server.services.environments.is_restricted(main)


async def test_what_was_done_and_refused_is_in_the_audit_trail_without_any_secret(tmp_path):
    async with whole_server(tmp_path) as server:
        made = api_pb2.SecretGetOrCreateRequest(
            deployment_name="keys", environment_name="main", object_creation_type=CREATE, env_dict={"K": "t0psecret"}
        )
        secret_id = (await server.call("SecretGetOrCreate", made)).message.secret_id
        token = await token_with(server, main=Role.VIEWER)
        delete = api_pb2.SecretDeleteRequest(secret_id=secret_id)
        assert (await server.call("SecretDelete", delete, metadata=token)).code is DENIED
        assert (await server.call("SecretDelete", delete)).code is OK
        entries = await server.services.audit.entries()
        assert [(one.who, one.action, one.environment, one.result) for one in entries] == [
            ("first", "SecretGetOrCreate", "main", "done"),
            ("limited", "SecretDelete", "main", "refused"),
            ("first", "SecretDelete", "main", "done"),
        ]
        assert secret_id in entries[0].target and "keys" in entries[0].target
        assert "t0psecret" not in repr(entries)
        assert [one.result for one in await server.services.audit.entries(of=token[0][1])] == ["refused"]
        app_id, function_id = await server.deploy("app", "greet")
        created = next(one for one in await server.services.audit.entries() if one.action == "FunctionCreate")
        assert created.target == f"greet {app_id} {function_id}"
