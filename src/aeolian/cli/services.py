"""Every service of the server, made once, told of the others, opened and closed in order."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from modal_proto import api_pb2

from aeolian.cli import client_token
from aeolian.cli.client_token import ClientToken
from aeolian.cli.listening import resolve
from aeolian.cli.settings import Settings, web_site
from aeolian.control.access import Access
from aeolian.control.apps import Apps
from aeolian.control.audit import AuditTrail
from aeolian.control.autoscaling import Autoscaling
from aeolian.control.blobs import Blobs
from aeolian.control.call_history import CallHistory
from aeolian.control.calls import Calls
from aeolian.control.classes import Classes
from aeolian.control.command_access import CommandAccess
from aeolian.control.command_starts import CommandStarts
from aeolian.control.container_history import ContainerHistory
from aeolian.control.container_requests import ContainerRequests
from aeolian.control.container_specs import ContainerSpecs
from aeolian.control.containers import Containers
from aeolian.control.data_channels import DataChannels
from aeolian.control.dependencies import Dependencies
from aeolian.control.deployments import Deployments
from aeolian.control.dicts import Dicts
from aeolian.control.environments import Environments
from aeolian.control.function_changes import FunctionChanges
from aeolian.control.functions import Functions
from aeolian.control.homes import homes
from aeolian.control.images import Images
from aeolian.control.log_history import LogHistory
from aeolian.control.log_retention import LogRetention
from aeolian.control.logs import AppLogs
from aeolian.control.mounts import Mounts
from aeolian.control.pools import Pools
from aeolian.control.proxy_tokens import ProxyTokens
from aeolian.control.queues import Queues
from aeolian.control.quotas import Quotas
from aeolian.control.recovery import Recovery
from aeolian.control.schedules import Schedules
from aeolian.control.secrets import Secrets
from aeolian.control.servers import Servers
from aeolian.control.signed_urls import SignedUrls, load_key
from aeolian.control.stats import Stats
from aeolian.control.token_flows import TokenFlows
from aeolian.control.tokens import Tokens
from aeolian.control.tunnels import Tunnels
from aeolian.control.url_tokens import UrlTokens
from aeolian.control.volume_collector import VolumeCollector
from aeolian.control.volume_commits import VolumeCommits
from aeolian.control.volume_contents import VolumeContents
from aeolian.control.volumes import Volumes
from aeolian.control.watched import Watched
from aeolian.control.web_calls import WebCalls
from aeolian.control.web_urls import WebUrls
from aeolian.control.workers import Workers
from aeolian.domain.caller import Caller
from aeolian.domain.calls import Tickets
from aeolian.domain.clock import SystemClock
from aeolian.domain.errors import FailedPrecondition
from aeolian.domain.link import ForgetVolumes
from aeolian.domain.roles import Right
from aeolian.gateway.app import Gateway
from aeolian.gateway.apps import AppPages
from aeolian.gateway.asgi import AsgiIngress
from aeolian.gateway.blobs import BlobRoutes
from aeolian.gateway.container_client import ContainerClients
from aeolian.gateway.ingress import Ingress
from aeolian.gateway.listeners import Listeners
from aeolian.gateway.metrics import MetricRoutes, measure
from aeolian.gateway.otlp import OtlpExporter
from aeolian.gateway.proxy_auth import ProxyAuth
from aeolian.gateway.servers import ServerProxy
from aeolian.gateway.token_flows import TokenFlowPages
from aeolian.gateway.tunnels import TunnelPorts, TunnelSocket
from aeolian.gateway.volumes import VolumeRoutes
from aeolian.protocol.apps import AppRpcs
from aeolian.protocol.blobs import BlobRpcs
from aeolian.protocol.calls import CallRpcs
from aeolian.protocol.classes import ClassRpcs
from aeolian.protocol.command_access import CommandAccessRpcs
from aeolian.protocol.command_router import CommandRouter
from aeolian.protocol.containers import ContainerRpcs
from aeolian.protocol.dicts import DictRpcs
from aeolian.protocol.environments import EnvironmentRpcs
from aeolian.protocol.functions import FunctionRpcs
from aeolian.protocol.guard import Guard
from aeolian.protocol.images import ImageRpcs
from aeolian.protocol.logs import LogRpcs
from aeolian.protocol.mounts import MountRpcs
from aeolian.protocol.people import PeopleRpcs
from aeolian.protocol.proxy_tokens import ProxyTokenRpcs
from aeolian.protocol.queues import QueueRpcs
from aeolian.protocol.secrets import SecretRpcs
from aeolian.protocol.servers import ServerRpcs
from aeolian.protocol.stats import StatsRpcs
from aeolian.protocol.token_flows import TokenFlowRpcs
from aeolian.protocol.tunnels import TunnelRpcs
from aeolian.protocol.volumes import VolumeRpcs
from aeolian.protocol.worker_link import ContainerCallers, WorkerCalls, WorkerLinks, worker_token
from aeolian.protocol.worker_volumes import WorkerVolumeCalls
from aeolian.protocol.workspace import WorkspaceRpcs
from aeolian.storage import calls as calls_storage
from aeolian.storage import keys, migrate
from aeolian.storage.blobs import FileBlobStore
from aeolian.storage.database import Database
from aeolian.storage.files import ContentStore
from aeolian.storage.volume_files import VolumeFiles
from aeolian.worker.interpreters import Interpreters, StandalonePythons
from aeolian.worker.link import TASK_KEY

log = logging.getLogger(__name__)


class Services:
    """`async with Services(settings):` — everything that the server does, but for its sockets."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._stack = contextlib.AsyncExitStack()
        clock = SystemClock()
        self.database = database = Database(migrate.normalized(settings.database))
        self.tokens = Tokens(database, clock, keys.load_or_create(settings.keys_dir, "tokens"))
        self.environments = environments = Environments(database, clock)
        self.proxy_tokens = ProxyTokens(
            database, clock, environments, keys.load_or_create(settings.keys_dir, "proxy-tokens")
        )
        self.logs = AppLogs(database, clock)
        self.apps = Apps(database, clock, environments, self.logs)
        self.listeners = Listeners(resolve(settings.host), settings.front_socket, settings.http_socket)
        self.web_urls = WebUrls(database, clock, self.apps, environments, self.listeners, web_site(settings))
        self.functions = self.web_urls.functions = Functions(database, self.apps, self.web_urls.address_of)
        self.logs.root_function_of = self.functions.base_function_id
        urls = SignedUrls(load_key(settings.keys_dir), settings.http_url, clock)
        content = ContentStore(settings.content_dir)
        self.blobs = Blobs(FileBlobStore(settings.blobs_dir), urls)
        pythons = StandalonePythons(settings.data_dir, Interpreters(settings.data_dir))
        self.mounts = Mounts(database, clock, content, self.blobs, environments, pythons)
        self.secrets = Secrets(database, clock, environments, keys.load_or_create(settings.keys_dir, "secrets"))
        self.dicts = Dicts(database, clock, environments)
        self.queues = Queues(database, clock, environments)
        volume_files = VolumeFiles(settings.volumes_dir / "content")
        self.volumes = Volumes(database, clock, environments)
        self.volume_collector = VolumeCollector(database, clock, volume_files)
        self.contents = VolumeContents(database, clock, volume_files, content, urls, self.volume_collector)
        self.commits = VolumeCommits(database, clock, volume_files)
        self.workers = Workers()
        self.pools = Pools(clock, self.functions, self.workers)
        self.calls = Calls(database, clock, self.apps, self.functions, self.pools)
        self.pools.payloads_of = self.calls.open_inputs.payloads_of
        self.channels = DataChannels(database, clock, self.calls)
        self.images = Images(
            database,
            clock,
            self.apps,
            environments,
            self.workers,
            self.mounts,
            self.secrets,
            self.functions,
            self.calls,
            self.logs,
        )
        specs = ContainerSpecs(self.functions, self.mounts, self.secrets, self.images, workspace=settings.workspace)
        self.history = ContainerHistory(database, clock)
        self.containers = Containers(
            self.history,
            clock,
            self.apps,
            self.functions,
            self.calls,
            self.pools,
            self.workers,
            specs,
            self.logs,
        )
        self.recovery = Recovery(self.containers, self.calls, self.pools, self.workers)
        self.autoscaling = Autoscaling(clock, self.functions, self.pools, self.containers)
        self.autoscaling.quotas = Quotas(clock, environments, self.apps, self.pools, self.containers, self.logs)
        self.classes = Classes(database, clock, self.apps, self.functions)
        dependencies = Dependencies(
            {
                "im": self.images.describe,
                "mo": self.mounts.describe,
                "st": self.secrets.objects.describe,
                "vo": self.volumes.describe,
                "di": self.dicts.objects.describe,
                "qu": self.queues.objects.describe,
                "fu": self.functions.describe,
                "cs": self.classes.describe,
            }
        )
        self.changes = FunctionChanges(database, clock, self.apps, self.functions, dependencies, self.web_urls)
        self.log_retention = LogRetention(database, clock, self.apps, settings.log_retention_days * 86400)
        self.schedules = Schedules(database, clock, self.apps, self.functions, self.calls)
        self.deployments = Deployments(database, clock, self.apps, self.functions, self.schedules)
        self._clock = clock
        self._tickets = Tickets(keys.load_or_create(settings.keys_dir, "tickets"))
        self._token = worker_token(settings.keys_dir)
        self._callers = ContainerCallers(
            self._token, self.containers, self.workers, self.apps, environments, workspace=settings.workspace
        )
        self._access = access = Access(
            database, environments, homes(database, self.apps, self.functions, self.calls, self.containers)
        )
        self.audit = AuditTrail(database, clock)
        self.token_flows = TokenFlows(self.tokens, clock)
        self.guard = Guard(access, self.audit, self._tickets.read_call)
        watched = Watched(self.apps, self.functions, self.calls, self.pools, self.containers, self.workers)
        self.metrics = watched.metrics
        self._exporter = OtlpExporter(settings.otlp_endpoint) if settings.otlp_endpoint else None
        if self._exporter is not None:
            watched.trace(self._exporter, settings.trace_sample)
        routes = (
            AppPages(self.apps, self.functions),
            BlobRoutes(self.blobs),
            VolumeRoutes(self.contents),
            MetricRoutes(self.metrics, self._authenticate_reader),
            TokenFlowPages(self.token_flows, self.audit),
        )
        ports = TunnelPorts(self.listeners, settings.tunnels_socket)
        self.tunnels = Tunnels(database, ports, has_certificate=settings.tls_certificate is not None)
        self.tunnel_socket = TunnelSocket(settings.tunnels_socket, self.tunnels, settings.ports_socket)
        self.containers.when_ended.append(self.tunnels.container_ended)
        self.servers = Servers(clock, self.pools, self.containers)
        self._url_tokens = UrlTokens(keys.load_or_create(settings.keys_dir, "url-tokens"), clock)
        self._clients = ContainerClients(settings.ports_socket)
        self.containers.when_ended.append(lambda container: self._clients.forget(container.task_id))
        auth = ProxyAuth(self.proxy_tokens, self._url_tokens)
        ingress = Ingress(
            self.web_urls,
            AsgiIngress(WebCalls(self.calls), self.blobs, auth, web_site(settings).scheme).serve,
            ServerProxy(self.servers, self._clients, auth.may_enter, web_site(settings).scheme).serve,
        )
        self.gateway = Gateway(
            [route for group in routes for route in group.routes()], [measure(self.metrics), ingress.middleware]
        )
        requests = ContainerRequests(self.containers, self.workers)
        self._command_access = CommandAccess(keys.load_or_create(settings.keys_dir, "commands"), clock)
        starts = CommandStarts(self.containers, self.apps, self.secrets)
        self.command_router = CommandRouter(self._command_access, starts, requests)
        self.links = WorkerLinks(
            self._token,
            self.recovery,
            self.containers,
            self.pools,
            self.calls,
            self.workers,
            self.logs,
            self.images,
            self.images.worker_connected,
            requests.answered,
        )
        self.worker_calls = WorkerCalls(self._token, WorkerVolumeCalls(self.commits))
        self._introduce()

    def _introduce(self) -> None:
        """What one noun must hear of another."""
        self.apps.fleet = self.containers
        self.calls.open_inputs.when_idle = self.apps.work_finished
        self.changes.when_rescaled.append(self.containers.rescaled)
        self.changes.num_containers_of = self.pools.num_containers
        self.changes.offered_runtimes = self.workers.runtimes
        owners = (self.secrets.objects, self.dicts.objects, self.queues.objects, self.volumes)
        for owner in owners:
            owner.check_owner = self.apps.living
            self.apps.when_ended.append(owner.delete_owned_by)
        for changed in (self.volumes, self.commits):
            changed.when_dropped.append(self.volume_collector.wake)
        self.volume_collector.when_freed.append(lambda ids: self.workers.send_to_all(ForgetVolumes(tuple(ids))))
        self.environments.when_renamed += (self.apps.environment_renamed, self.functions.environment_renamed)
        self.environments.when_deleted.append(self.apps.stop_all_in)
        for owner in owners:
            self.environments.when_deleted.append(_without_who(owner.delete_in))
        self.environments.when_deleted.append(_without_who(self.images.names.delete_in))
        self.environments.when_deleted.append(_without_who(self.tokens.environment_deleted))
        self.containers.when_ended.append(self.images.container_ended)

    # ---- life -------------------------------------------------------------------------------------------

    async def __aenter__(self) -> "Services":
        stack = self._stack
        if self._exporter is not None:
            stack.push_async_callback(asyncio.to_thread, self._exporter.close)
        self.database.open()
        stack.push_async_callback(self.database.close)
        await self.environments.load()
        await self.proxy_tokens.load()
        await self._ensure_client_token()
        for service in (
            self.logs,
            self.secrets.objects,
            self.dicts.objects,
            self.queues,
            self.volumes,
            self.volume_collector,
            self.mounts,
        ):
            await service.open()
            stack.push_async_callback(service.close)
        await self.apps.load()
        await self.functions.load()
        await self.listeners.start()
        stack.callback(self.listeners.stop)
        await self.web_urls.load()
        await self.tunnels.load()
        stack.push_async_callback(self.tunnels.close)
        self.listeners.close_others()
        await self.blobs.open(self._clock, self._blobs_in_use)
        stack.push_async_callback(self.blobs.close)
        stack.push_async_callback(self.calls.close)
        await self.images.load()
        self.history.open()
        stack.push_async_callback(self.history.close)
        await self.recovery.load()
        await self.tunnels.drop_unknown(self.containers.get)
        await self.tunnel_socket.start()
        stack.push_async_callback(self.tunnel_socket.stop)
        stack.push_async_callback(self.containers.close)
        stack.callback(self.recovery.close)
        await self.images.open()
        stack.push_async_callback(self.images.close)
        await self.calls.start_sweeping(self.blobs.delete)
        self.autoscaling.start()
        stack.push_async_callback(self.autoscaling.close)
        await self.apps.start()
        stack.push_async_callback(self.apps.close)
        stack.push_async_callback(self._clients.close)
        self.log_retention.open()
        stack.push_async_callback(self.log_retention.close)
        await self.schedules.open()
        stack.push_async_callback(self.schedules.close)
        self.containers.keep_warm()
        return self

    async def __aexit__(self, *error) -> None:
        await self._stack.aclose()

    async def _ensure_client_token(self) -> None:
        """The token that `aeolian connect` hands out: made at the first start, and when it was lost."""
        with contextlib.suppress(FailedPrecondition):
            token = client_token.load(self._settings)
            if any(known.token_id == token.token_id for known in await self.tokens.all()):
                return
        token_id, secret = await self.tokens.create("first", self._settings.workspace)
        client_token.save(self._settings, ClientToken(token_id, secret))
        log.info("made a token for clients: `aeolian connect` uses it")

    async def _blobs_in_use(self) -> set[str]:
        def read(connection) -> set[str]:
            inputs = map(api_pb2.FunctionInput.FromString, calls_storage.unfinished_payloads(connection))
            return {item.args_blob_id for item in inputs if item.args_blob_id}

        return await self.database.read(read)

    # ---- for the sockets --------------------------------------------------------------------------------

    async def authenticate(self, metadata: dict[str, Any]) -> Caller:
        if TASK_KEY in metadata:
            return await self._callers.authenticate(metadata)
        return await self.tokens.authenticate(metadata)

    async def _authenticate_reader(self, metadata: dict[str, Any]) -> Caller:
        """Somebody who may look at everything."""
        caller = await self.tokens.authenticate(metadata)
        self._access.check_everywhere(caller, Right.READ)
        return caller

    def resources(self) -> list[object]:
        """What answers the ModalClient RPCs."""
        return [
            AppRpcs(self.apps, self.deployments, self.functions, self._settings.http_url),
            BlobRpcs(self.blobs),
            CallRpcs(
                self.calls,
                self.channels,
                CallHistory(self.database, self.calls, self.functions),
                self.functions,
                self.blobs,
                self._tickets,
            ),
            StatsRpcs(Stats(self.database, self.apps, self.functions, self.calls, self.pools)),
            ClassRpcs(self.classes),
            CommandAccessRpcs(self.containers, self._command_access, self._settings.grpc_url),
            ContainerRpcs(self.containers, self.pools, self.apps, self.functions),
            DictRpcs(self.dicts),
            EnvironmentRpcs(self.environments),
            FunctionRpcs(self.functions, self.changes),
            ImageRpcs(self.images, self._clock),
            LogRpcs(self.apps, self.logs, LogHistory(self.database), self._clock, self.containers.app_of_task),
            MountRpcs(self.mounts, self._clock),
            ProxyTokenRpcs(self.proxy_tokens, self.environments),
            QueueRpcs(self.queues),
            SecretRpcs(self.secrets, self.environments),
            ServerRpcs(
                self.functions,
                self.pools,
                self.web_urls,
                self._url_tokens,
                self._access,
                web_site(self._settings).host,
            ),
            TunnelRpcs(
                self.tunnels,
                web_site(self._settings).host,
                has_certificate=self._settings.tls_certificate is not None,
            ),
            VolumeRpcs(self.volumes, self.contents),
            PeopleRpcs(self.tokens, self.environments, self._clock),
            TokenFlowRpcs(self.token_flows, self._settings.http_url),
            WorkspaceRpcs(self.tokens, self.apps, self.functions),
        ]


def _without_who(delete: Callable[[str], Awaitable[None]]) -> Callable[[str, str], Awaitable[None]]:
    async def call(environment_id: str, who: str) -> None:
        await delete(environment_id)

    return call
