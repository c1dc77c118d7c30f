"""A server in the test's own process with the real app services, for the real SDK to talk to.

What belongs to other nouns (environments, images, mounts, secrets, tasks) is the least that the SDK needs.
"""

import asyncio
import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import grpc
from modal_proto import api_pb2

from aeolian.control.apps import Apps, NoFleet
from aeolian.control.classes import Classes
from aeolian.control.definitions import WebAddress, WebFunction
from aeolian.control.deployments import Deployments
from aeolian.control.function_changes import FunctionChanges
from aeolian.control.functions import Functions
from aeolian.control.log_history import LogHistory
from aeolian.control.logs import AppLogs
from aeolian.control.schedules import Schedules
from aeolian.domain.caller import Caller
from aeolian.domain.clock import SystemClock
from aeolian.domain.errors import NotFound
from aeolian.protocol.apps import AppRpcs
from aeolian.protocol.classes import ClassRpcs
from aeolian.protocol.functions import FunctionRpcs
from aeolian.protocol.logs import LogRpcs
from aeolian.protocol.service import ModalService
from aeolian.storage.database import Database, metadata

CALLER = Caller(workspace="local", token_id="ak-test", sdk_version="1.6.4")


class NamedEnvironment(NamedTuple):
    id: str
    name: str


class SomeEnvironments:
    def resolve(self, name: str, caller: Caller) -> NamedEnvironment:
        name = name or caller.environment_name or "main"
        if name not in ("main", "dev"):
            raise NotFound(f"there is no environment '{name}'")
        return NamedEnvironment(f"en-{name}", name)


class KnownObjects:
    """Dependencies: everything exists but what is in `missing`."""

    def __init__(self) -> None:
        self.missing: set[str] = set()

    async def describe(self, object_ids: set[str], caller: Caller) -> dict[str, api_pb2.Object]:
        found = {}
        for object_id in object_ids - self.missing:
            found[object_id] = api_pb2.Object(object_id=object_id)
            if object_id.startswith("vo-"):
                found[object_id].volume_metadata.version = api_pb2.VOLUME_FS_VERSION_V2
        return found


class RecordingFleet(NoFleet):
    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.idle = True

    async def stop_app(self, app_id: str, *, graceful: bool) -> None:
        self.events.append(("stop", app_id))

    async def retire_functions(self, function_ids) -> None:
        self.events.append(("retire", set(function_ids)))

    async def definitions_changed(self, app_id: str) -> None:
        self.events.append(("changed", app_id))

    def is_idle(self, app_id: str) -> bool:
        return self.idle


class OtherRpcs:
    """The least that the SDK needs of other nouns."""

    def __init__(self, task_apps: dict[str, str]):
        self._task_apps = task_apps
        self._started_at = time.time() - 3600

    async def ClientHello(self, request, caller):
        return api_pb2.ClientHelloResponse()

    async def EnvironmentGetOrCreate(self, request, caller):
        name = request.deployment_name or "main"
        return api_pb2.EnvironmentGetOrCreateResponse(
            environment_id=f"en-{name}",
            metadata=api_pb2.EnvironmentMetadata(
                name=name, settings=api_pb2.EnvironmentSettings(image_builder_version="2025.06")
            ),
        )

    async def ImageGetOrCreate(self, request, caller):
        digest = hashlib.sha256(request.image.SerializeToString(deterministic=True)).hexdigest()[:22]
        return api_pb2.ImageGetOrCreateResponse(
            image_id=f"im-{digest}",
            result=api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS),
            metadata=api_pb2.ImageMetadata(image_builder_version=request.builder_version),
        )

    async def MountBatchedCheckExistence(self, request, caller):
        return api_pb2.MountBatchedCheckExistenceResponse()

    async def MountPutFile(self, request, caller):
        return api_pb2.MountPutFileResponse(exists=True)

    async def MountGetOrCreate(self, request, caller):
        parts = sorted(file.SerializeToString() for file in request.files)
        digest = hashlib.sha256(b"".join(parts) + request.deployment_name.encode()).hexdigest()
        return api_pb2.MountGetOrCreateResponse(
            mount_id=f"mo-{digest[:22]}",
            handle_metadata=api_pb2.MountHandleMetadata(content_checksum_sha256_hex=digest),
        )

    async def VolumeGetOrCreate(self, request, caller):
        digest = hashlib.sha256(request.deployment_name.encode()).hexdigest()[:22]
        return api_pb2.VolumeGetOrCreateResponse(
            volume_id=f"vo-{digest}",
            metadata=api_pb2.VolumeMetadata(version=api_pb2.VOLUME_FS_VERSION_V2, name=request.deployment_name),
        )

    async def TaskList(self, request, caller):
        return api_pb2.TaskListResponse()

    async def TaskGetInfo(self, request, caller):
        if request.task_id not in self._task_apps:
            raise NotFound(f"there is no container '{request.task_id}'")
        return api_pb2.TaskGetInfoResponse(
            app_id=self._task_apps[request.task_id], info=api_pb2.TaskInfo(enqueued_at=self._started_at)
        )

    async def FunctionGetCurrentStats(self, request, caller):
        return api_pb2.FunctionStats()

    async def ObjectSuggest(self, request, caller):
        return api_pb2.ObjectSuggestResponse()


class SomeAddresses:
    """Everybody has an address."""

    async def claim(self, webs: Sequence[WebFunction]) -> None: ...

    def address_of(self, web: WebFunction) -> WebAddress:
        return WebAddress(f"http://web.test/{web.function_id}/{web.method_name}")


class AppServer:
    """All app services over one database file, and a port for clients."""

    def __init__(self, path):
        self.path = path
        self.database = Database(f"sqlite:///{path}")
        metadata.create_all(self.database.engine)
        self.clock = SystemClock()
        self.fleet = RecordingFleet()
        self.known = KnownObjects()
        self.task_apps: dict[str, str] = {}

    async def __aenter__(self) -> "AppServer":
        self.database.open()
        self.logs = AppLogs(self.database, self.clock)
        self.apps = Apps(self.database, self.clock, SomeEnvironments(), self.logs)
        addresses = SomeAddresses()
        self.functions = Functions(self.database, self.apps, addresses.address_of)
        self.changes = FunctionChanges(self.database, self.clock, self.apps, self.functions, self.known, addresses)
        self.logs.root_function_of = self.functions.base_function_id
        self.apps.fleet = self.fleet
        schedules = Schedules(self.database, self.clock, self.apps, self.functions, calls=None)
        self.deployments = Deployments(self.database, self.clock, self.apps, self.functions, schedules)
        self.classes = Classes(self.database, self.clock, self.apps, self.functions)
        await self.logs.open()
        await self.apps.load()
        await self.functions.load()
        await self.apps.start()

        async def app_of_task(task_id: str) -> str | None:
            return self.task_apps.get(task_id)

        async def authenticate(metadata) -> Caller:
            return Caller(
                workspace="local",
                token_id="ak-test",
                sdk_version=str(metadata.get("x-modal-client-version", "")),
                idempotency_key=str(metadata.get("x-idempotency-key", "")),
            )

        self.app_rpcs = AppRpcs(self.apps, self.deployments, self.functions, "http://aeolian.test")
        self.function_rpcs = FunctionRpcs(self.functions, self.changes)
        self.class_rpcs = ClassRpcs(self.classes)
        self.log_rpcs = LogRpcs(self.apps, self.logs, LogHistory(self.database), self.clock, app_of_task)
        resources = [
            self.app_rpcs,
            self.function_rpcs,
            self.class_rpcs,
            self.log_rpcs,
            OtherRpcs(self.task_apps),
        ]
        self.server = grpc.aio.server()
        self.server.add_generic_rpc_handlers((ModalService(resources, authenticate, open_methods=frozenset()),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return self

    async def __aexit__(self, *exc) -> None:
        await self.server.stop(0)
        await self.apps.close()
        await self.logs.close()
        await self.database.close()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MODAL_SERVER_URL": f"http://127.0.0.1:{self.port}",
            "MODAL_TOKEN_ID": "ak-test",
            "MODAL_TOKEN_SECRET": "as-test",
            "MODAL_CONFIG_PATH": "/dev/null",
        }

    async def run(self, *args: str, cwd=None, ok: bool = True, timeout: float = 60) -> str:
        """Run a command with the environment of a client; returns what it printed."""
        process = await self.start(*args, cwd=cwd)
        try:
            output, _ = await asyncio.wait_for(process.communicate(), timeout)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise
        text = output.decode()
        assert (process.returncode == 0) == ok, text
        return text

    async def start(self, *args: str, cwd=None) -> asyncio.subprocess.Process:
        environment = {**os.environ, **self.environment, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
        return await asyncio.create_subprocess_exec(
            *args, cwd=cwd, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )

    async def modal(self, *args: str, **kwargs) -> str:
        """The real CLI."""
        return await self.run(sys.executable, "-m", "modal", *args, **kwargs)

    async def python(self, code: str, **kwargs) -> str:
        return await self.run(sys.executable, "-c", code, **kwargs)
