"""The worker's process on this machine: dials the server, keeps the node's containers, builds its images."""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import time
from pathlib import Path
from urllib.parse import urlsplit

import uvloop

from aeolian.cli import log_output
from aeolian.cli.exit_status import errors_end_the_process
from aeolian.cli.front import raise_file_limit, tls_context
from aeolian.cli.settings import Settings, load
from aeolian.domain.errors import FailedPrecondition, Unavailable
from aeolian.domain.web import MAX_PORTS
from aeolian.storage.files import ContentStore
from aeolian.worker.agent import Agent
from aeolian.worker.hooks.mounts import MountsHook, MountTrees
from aeolian.worker.hooks.network import NetworkHook
from aeolian.worker.hooks.volumes import VolumesHook
from aeolian.worker.images.builder import ImageBuilder
from aeolian.worker.images.store import ImageStore
from aeolian.worker.interpreters import Interpreters, StandalonePythons
from aeolian.worker.networks.networks import Networks, Offered
from aeolian.worker.ports import ContainerPorts
from aeolian.worker.runtimes.base import Runtime, RuntimeUnavailable
from aeolian.worker.runtimes.gvisor import GvisorRuntime
from aeolian.worker.runtimes.native import NativeRuntime
from aeolian.worker.runtimes.process import ProcessRuntime
from aeolian.worker.runtimes.selection import choose
from aeolian.worker.sdk import SdkStore
from aeolian.worker.volume_authority import LinkedVolumeAuthority
from aeolian.worker.volume_rpcs import WorkerVolumeRpcs
from aeolian.worker.volumes import WorkerVolumes

log = logging.getLogger(__name__)

TOKEN_WAIT_S = 30.0


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM, then let containers finish what they hold: not when it is the supervisor that has died."""
    supervisor = os.getppid()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    token = await _token(settings, stop)
    if not token:
        return
    data_dir = settings.data_dir
    images = ImageStore(data_dir)
    content = ContentStore(settings.content_dir)
    interpreters = Interpreters(data_dir)
    sdk = SdkStore(data_dir, interpreters)
    authority = _LateAuthority()
    volumes = WorkerVolumes(data_dir, LinkedVolumeAuthority(authority.call))
    layers = [MountsHook(MountTrees(data_dir, content))]
    gateway = urlsplit(settings.http_url)
    offered = Offered(
        gateway.hostname or "",
        gateway.port or settings.http_port,
        settings.http_socket,
        tls_context(settings, ["http/1.1"]),
        f"{settings.web_port}-{min(settings.web_port + MAX_PORTS, 65_536) - 1}" if settings.web_port else "",
    )
    networks = Networks(data_dir, offered)
    runtime, *other_runtimes = await _runtimes(settings, images, sdk, layers, [VolumesHook(volumes)], networks)
    pythons = StandalonePythons(data_dir, interpreters)
    builder = ImageBuilder(images, content, interpreters, pythons, data_dir)
    agent = Agent(
        worker_id=_worker_id(data_dir),
        containers_dir=data_dir / "containers",
        link_socket=settings.worker_socket,
        rpc_socket=settings.grpc_socket,
        token=token,
        runtime=runtime,
        other_runtimes=other_runtimes,
        images=images,
        builder=builder,
        volume_rpcs=WorkerVolumeRpcs(volumes),
    )
    authority.call_volumes = agent.link.call_volumes
    ports = ContainerPorts(settings.ports_socket, networks, agent.has_running)
    agent.use_ports(ports)
    for each in (runtime, *other_runtimes):
        await each.open()
    await _open_networks(networks, runtime)
    await volumes.open()
    await ports.open()
    try:
        await agent.open()
        settings.runtime_path.write_text(runtime.name)
        log.info("containers run on the runtime '%s'", runtime.name)
        gc.collect()
        gc.freeze()
        await stop.wait()
        await agent.close(settings.drain_s if os.getppid() == supervisor else 0.0)
    finally:
        await ports.close()
        await volumes.close()
        for each in (runtime, *other_runtimes):
            await each.close()
        await networks.close()


async def _open_networks(networks: Networks, runtime: Runtime) -> None:
    try:
        await networks.open()
    except Unavailable as error:
        level = logging.INFO if runtime.name == "process" else logging.WARNING
        log.log(level, "CONTAINERS SHARE THIS HOST'S NETWORK and reach what listens on its loopback: %s", error.message)


class _LateAuthority:
    """The connection exists only once the agent does."""

    def __init__(self) -> None:
        self.call_volumes = None

    async def call(self, method: str, request: bytes) -> bytes:
        assert self.call_volumes is not None
        return await self.call_volumes(method, request)


async def _runtimes(
    settings: Settings, images: ImageStore, sdk: SdkStore, layers: list, hooks: list, networks: Networks
) -> list[Runtime]:
    """The worker's own, then those that apps may ask for. Raises FailedPrecondition when it cannot run here."""
    try:
        chosen = await choose(settings.runtime, settings.data_dir)
    except RuntimeUnavailable as error:
        raise FailedPrecondition(str(error)) from error
    for offer in chosen.missing:
        log.info("not taken: %s", offer)
    # Without isolation the host's network is shared, but servers of one port can only live side by side apart.
    wants = (lambda spec: spec.is_server) if chosen.name == "process" else (lambda spec: True)
    place = (settings.data_dir, images, sdk)
    hooks = [*hooks, NetworkHook(networks, wants)]

    def made(name: str) -> Runtime:
        if name == "gvisor":
            return GvisorRuntime(*place, layers=layers, hooks=hooks)
        if name == "native":
            return NativeRuntime(*place, layers=layers, hooks=hooks, max_standbys=settings.max_standbys)
        return ProcessRuntime(*place, layers=layers, hooks=hooks)

    return [made(name) for name in (chosen.name, *chosen.others)]


async def _token(settings: Settings, stop: asyncio.Event) -> str:
    """What the server made at its first start. "": stopped while waiting for it."""
    path = settings.keys_dir / "worker-token"
    until = time.monotonic() + TOKEN_WAIT_S
    while not stop.is_set():
        with contextlib.suppress(FileNotFoundError):
            return path.read_text()
        if time.monotonic() > until:
            raise Unavailable(f"the server has made no token for workers at {path} within {TOKEN_WAIT_S:g} s")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.05)
    return ""


def _worker_id(data_dir: Path) -> str:
    """Stable for a data directory."""
    path = data_dir / "run" / "worker-id"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text()
    worker_id = f"wo-{secrets.token_hex(11)}"
    fresh = path.with_suffix(".new")
    fresh.write_text(worker_id)
    fresh.replace(path)
    return worker_id


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m aeolian.cli.worker", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    settings = load(parser.parse_args().config)
    log_output.configure("worker", settings.log_level, settings.log_format)
    raise_file_limit()
    with errors_end_the_process(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings))


if __name__ == "__main__":
    main()
