"""A server with only Blobs and Volumes, for the real client: gRPC and the gateway on loopback."""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import grpc
import modal
from modal_proto import api_pb2

from aeolian.control.blobs import Blobs
from aeolian.control.signed_urls import SignedUrls, load_key
from aeolian.control.volume_collector import VolumeCollector
from aeolian.control.volume_commits import VolumeCommits
from aeolian.control.volume_contents import VolumeContents
from aeolian.control.volumes import Volumes
from aeolian.domain.caller import Caller
from aeolian.domain.clock import SystemClock
from aeolian.gateway.app import Gateway
from aeolian.gateway.blobs import BlobRoutes
from aeolian.gateway.volumes import VolumeRoutes
from aeolian.protocol.blobs import BlobRpcs
from aeolian.protocol.service import ModalService
from aeolian.protocol.volumes import VolumeRpcs
from aeolian.storage.blobs import FileBlobStore
from aeolian.storage.database import Database, metadata
from aeolian.storage.files import ContentStore
from aeolian.storage.volume_files import VolumeFiles


@dataclass
class FixedEnvironment:
    id: str
    name: str


class FixedEnvironments:
    def resolve(self, name: str, caller: Caller) -> FixedEnvironment:
        return FixedEnvironment(f"en-{name or 'main'}", name or "main")


class MountFileRpcs:
    """Where v1 uploads put their content."""

    def __init__(self, content: ContentStore, blobs: Blobs):
        self._content, self._blobs = content, blobs

    async def MountPutFile(self, request, caller):
        match request.WhichOneof("data_oneof"):
            case "data":
                self._content.put(request.data, request.sha256_hex)
            case "data_blob_id":
                self._content.put_file(await self._blobs.open_path(request.data_blob_id))
        return api_pb2.MountPutFileResponse(exists=self._content.has(request.sha256_hex))


@dataclass
class StorageServer:
    volumes: Volumes
    contents: VolumeContents
    commits: VolumeCommits
    collector: VolumeCollector
    blobs: Blobs
    files: VolumeFiles
    database: Database
    client: modal.Client
    grpc_url: str
    http_port: int
    root: Path


@contextlib.asynccontextmanager
async def storage_server(root: Path, monkeypatch, *, public_host: str = "127.0.0.1", volume_rpcs=VolumeRpcs):
    """`volume_rpcs(volumes, contents)`: what answers the Volume RPCs."""
    clock = SystemClock()
    database = Database(f"sqlite:///{root}/test.db")
    metadata.create_all(database.engine)
    database.open()
    urls = SignedUrls(load_key(root / "keys"), "http://later", clock)
    blobs = Blobs(FileBlobStore(root / "blobs"), urls)
    files, content = VolumeFiles(root / "volumes/content"), ContentStore(root / "content")
    volumes = Volumes(database, clock, FixedEnvironments())
    collector = VolumeCollector(database, clock, files)
    contents = VolumeContents(database, clock, files, content, urls, collector)
    commits = VolumeCommits(database, clock, files)
    await volumes.open()
    gateway = Gateway([*BlobRoutes(blobs).routes(), *VolumeRoutes(contents).routes()])
    http_port = await gateway.start_tcp("127.0.0.1")
    urls.base_url = f"http://{public_host}:{http_port}"

    async def authenticate(fields):
        return Caller("local", token_id="ak-test", idempotency_key=str(fields.get("x-idempotency-key", "")))

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 128 << 20)])
    resources = [BlobRpcs(blobs), volume_rpcs(volumes, contents), MountFileRpcs(content, blobs)]
    server.add_generic_rpc_handlers([ModalService(resources, authenticate, open_methods=frozenset())])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    monkeypatch.setenv("MODAL_SERVER_URL", f"http://127.0.0.1:{port}")
    client = await modal.Client.from_credentials.aio("ak-test", "as-test")
    try:
        yield StorageServer(
            volumes,
            contents,
            commits,
            collector,
            blobs,
            files,
            database,
            client,
            f"http://127.0.0.1:{port}",
            http_port,
            root,
        )
    finally:
        await client.close.aio()
        await server.stop(None)
        await gateway.stop()
        await volumes.close()
        await database.close()


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
