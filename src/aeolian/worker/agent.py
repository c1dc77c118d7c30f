"""The worker: carries out the server's commands, and keeps what it holds while the server is away."""

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
from modal_proto import api_pb2

from aeolian.domain.containers import ContainerSpec, ContainerState, ExitStatus
from aeolian.domain.errors import AeolianError, FailedPrecondition
from aeolian.domain.execs import Answer as ExecAnswer
from aeolian.domain.execs import Done, ReloadVolumes, refused
from aeolian.domain.images import ImageSpec
from aeolian.domain.link import (
    AckExit,
    AckLogs,
    AckOutputs,
    AssignInputs,
    BuildImage,
    CancelBuild,
    CancelInputs,
    Command,
    ContainerAnswer,
    ContainerChanged,
    ContainerRequest,
    Event,
    ForgetVolumes,
    Hello,
    ImageBuilt,
    Leaving,
    LogLine,
    PrepareImage,
    StartContainer,
    StopContainer,
    Welcome,
)
from aeolian.worker.container import WorkerContainer
from aeolian.worker.disk_watch import DEFAULT_MAX_BYTES, DiskWatch, Writer
from aeolian.worker.execs.execs import Execs
from aeolian.worker.images.overlay_files import remove_tree
from aeolian.worker.images.store import StoredImage
from aeolian.worker.link import ServerLink
from aeolian.worker.logs import LogSender
from aeolian.worker.ports import ContainerPorts
from aeolian.worker.rpc import Answer, parsed
from aeolian.worker.runtimes.base import Runtime
from aeolian.worker.volume_rpcs import WorkerVolumeRpcs

log = logging.getLogger(__name__)

KILL_WAIT_S = 5.0
STORE_WAIT_S = 5.0
"""At its end: how long a worker waits for the server to store outputs and logs."""
SHUTTING_DOWN = "the worker is shutting down"
MAX_ENDS_KEPT = 100
"""Ends of builds that are repeated after a reconnection."""


class ImageBuilder(Protocol):
    async def build(
        self,
        image_id: str,
        spec: ImageSpec,
        env: dict[str, str],
        on_log: Callable[[int, str], None],
        *,
        force: bool = False,
    ) -> dict[str, str]: ...


class Images(Protocol):
    def ids(self, *, over_host: bool = True) -> list[str]: ...

    def get(self, image_id: str) -> StoredImage: ...

    async def commit_upper(self, image_id: str, base_image_id: str, upper: Path) -> None: ...


class _Running(NamedTuple):
    """A build under way."""

    build_id: str
    task: asyncio.Task


class Agent:
    def __init__(
        self,
        *,
        worker_id: str,
        containers_dir: Path,
        link_socket: Path,
        rpc_socket: Path,
        token: str,
        runtime: Runtime,
        other_runtimes: Sequence[Runtime] = (),
        images: Images,
        builder: ImageBuilder,
        volume_rpcs: WorkerVolumeRpcs | None = None,
        num_gpus: int = 0,
    ):
        self._worker_id = worker_id
        self._life = f"{worker_id}.{secrets.token_hex(4)}"
        self._containers_dir = containers_dir
        self._token = token
        self._runtime = runtime
        self._runtimes = {it.name: it for it in (runtime, *other_runtimes)}
        """By name: those that a Function may ask for."""
        self._images = images
        self._builder = builder
        self._num_gpus = num_gpus
        self._is_leaving = False
        self._containers: dict[str, WorkerContainer] = {}
        """Those that the server may not know to have ended, too."""
        self._all_gone = asyncio.Event()
        self._all_gone.set()
        self._builds: dict[str, _Running] = {}
        """By image."""
        self._preparing: dict[PrepareImage, asyncio.Task] = {}
        self._built: dict[str, ImageBuilt] = {}
        """Ends of builds, by build, that a server may not have heard of."""
        self.link = ServerLink(link_socket, rpc_socket, token, self._hello, self._carry_out, self._connected)
        self._logs = LogSender(self.link.send)
        self._disk_watch = DiskWatch(containers_dir, self._writers)
        self._volume_rpcs = volume_rpcs
        self._ports: ContainerPorts | None = None
        self._execs = Execs(containers_dir.with_name("execs"))
        self._asked: set[asyncio.Task] = set()

    def use_ports(self, ports: ContainerPorts) -> None:
        self._ports = ports

    def use_volumes(self, volume_rpcs: WorkerVolumeRpcs) -> None:
        self._volume_rpcs = volume_rpcs

    async def open(self) -> None:
        """Start serving. What a killed predecessor left has been ended by the runtime."""
        await asyncio.to_thread(remove_tree, self._containers_dir)
        self._containers_dir.mkdir(
            mode=0o700, parents=True, exist_ok=True
        )  # arguments may hold what others must not read
        await self._execs.open()
        self._disk_watch.open()
        self.link.open()

    async def close(self, drain_s: float) -> None:
        """Let containers finish what they hold, as long as `drain_s` allows. Their outputs and logs still go up."""
        self._is_leaving = True
        self._send(Leaving())
        ending = list(self._containers.values())
        for container in ending:
            container.stop(StopContainer(container.task_id, drain=True, reason=SHUTTING_DOWN))
        if ending:
            log.info("waiting for %d container(s) to end", len(ending))
            ends = [asyncio.create_task(container.ended()) for container in ending]
            _, late = await asyncio.wait(ends, timeout=drain_s)
            if late:
                log.warning("%d container(s) did not end within %g s: they are killed", len(late), drain_s)
                for container in ending:
                    container.stop(StopContainer(container.task_id, graceful=False))
                await asyncio.wait(late, timeout=KILL_WAIT_S)
        await self._execs.close()
        await self._disk_watch.close()
        behind = [*(running.task for running in self._builds.values()), *self._preparing.values(), *self._asked]
        for task in behind:
            task.cancel()
        await asyncio.gather(*behind, return_exceptions=True)
        if self.link.is_connected or drain_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STORE_WAIT_S):
                    await self._logs.drained()
                    await self._all_gone.wait()
        await self.link.close()

    # ---- the link ---------------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        return Hello(
            worker_id=self._worker_id,
            life=self._life,
            runtimes=tuple(self._runtimes),
            milli_cpu=1000 * len(os.sched_getaffinity(0)),
            memory_mb=_memory_mb(),
            num_gpus=self._num_gpus,
            containers=tuple(container.report() for container in self._containers.values()),
            # Other runtimes cannot start what lies over the host's folders: such an image is built again.
            image_ids=tuple(self._images.ids(over_host=self._runtime.name == "process")),
            is_leaving=self._is_leaving,
        )

    def _connected(self) -> None:
        self._logs.repeat()
        for container in self._containers.values():
            container.repeat()
        for built in self._built.values():
            self.link.send(built)

    def _send(self, event: Event) -> None:
        self.link.send(event)

    def _carry_out(self, command: Command) -> None:
        match command:
            case AssignInputs():
                if (container := self._containers.get(command.task_id)) is not None:
                    container.assign(command)
            case AckOutputs():
                if (container := self._containers.get(command.task_id)) is not None:
                    container.acknowledge(command.seq)
            case AckLogs():
                self._logs.acknowledged(command.seq)
            case AckExit():
                if (container := self._containers.get(command.task_id)) is not None:
                    container.acknowledge_exit()
            case StartContainer():
                self._start(command.spec)
            case StopContainer():
                if (container := self._containers.get(command.task_id)) is not None:
                    container.stop(command)
            case CancelInputs():
                if (container := self._containers.get(command.task_id)) is not None:
                    container.cancel(command)
            case BuildImage():
                self._build(command)
            case CancelBuild():
                self._cancel_build(command)
            case PrepareImage():
                self._prepare(command)
            case ContainerRequest():
                task = asyncio.create_task(self._answer(command))
                self._asked.add(task)
                task.add_done_callback(self._asked.discard)
            case ForgetVolumes():
                if self._volume_rpcs is not None:
                    self._volume_rpcs.forget(command.volume_ids)
            case Welcome():
                for task_id in command.unknown_task_ids:
                    if (container := self._containers.get(task_id)) is not None:
                        reason = "the server does not know it any more"
                        container.stop(StopContainer(task_id, graceful=False, reason=reason))

    # ---- containers -------------------------------------------------------------------------------------

    def _start(self, spec: ContainerSpec) -> None:
        if spec.task_id in self._containers:
            return
        if self._is_leaving:
            self._refuse(spec, ExitStatus(exit_code=0, reason=SHUTTING_DOWN))
            return
        runtime = self._runtimes.get(spec.runtime) if spec.runtime else self._runtime
        if runtime is None:
            offered = ", ".join(self._runtimes)
            reason = f"its runtime '{spec.runtime}' is not one of this worker: it has {offered}"
            self._refuse(spec, ExitStatus(exit_code=1, reason=reason))
            return
        self._all_gone.clear()
        self._containers[spec.task_id] = WorkerContainer(
            spec,
            runtime,
            self._containers_dir / spec.task_id,
            channel=self.link.channel,
            token=self._token,
            send=self._send,
            logs=self._logs,
            volume_rpcs=self._own_rpcs(spec.task_id),
            on_ended=self._save_image if spec.save_image_as else None,
            on_gone=self._gone,
            on_over=self._execs.container_ended,
            ports=self._ports,
        )

    def _refuse(self, spec: ContainerSpec, exit: ExitStatus) -> None:
        self._send(ContainerChanged(spec.task_id, ContainerState.EXITED.value, time.time(), exit=exit))

    def _writers(self) -> list[Writer]:
        found = []
        for container in self._containers.values():
            if (folder := container.written) is not None:
                max_bytes = container.spec.resources.ephemeral_disk_mb << 20 or DEFAULT_MAX_BYTES
                found.append(Writer(container.task_id, folder, max_bytes, container.fill_disk))
        return found

    def has_running(self, task_id: str) -> bool:
        return task_id in self._containers

    def _gone(self, container: WorkerContainer) -> None:
        self._containers.pop(container.task_id, None)
        if not self._containers:
            self._all_gone.set()

    def _own_rpcs(self, task_id: str) -> dict[str, Answer]:
        rpcs = self._volume_rpcs
        if rpcs is None:
            return {}

        async def commit(raw: bytes, key: str) -> bytes:
            request = parsed(api_pb2.VolumeCommitRequest, raw)
            return (await rpcs.VolumeCommit(request, task_id)).SerializeToString()

        async def reload(raw: bytes, key: str) -> bytes:
            request = parsed(api_pb2.VolumeReloadRequest, raw)
            return (await rpcs.VolumeReload(request, task_id)).SerializeToString()

        return {"VolumeCommit": commit, "VolumeReload": reload}

    # ---- what is asked of containers --------------------------------------------------------------------

    async def _answer(self, command: ContainerRequest) -> None:
        answer: ExecAnswer
        try:
            container = self._containers.get(command.task_id)
            if isinstance(command.request, ReloadVolumes):
                await self._reload_volumes(container)
                answer = Done()
            else:
                running = container.running if container is not None else None
                answer = await self._execs.answer(command.task_id, running, command.request)
        except AeolianError as error:
            answer = refused(error)
        except Exception:
            log.exception("a request about a command in a container could not be answered")
            answer = refused(FailedPrecondition("the worker has a bug; see its log"))
        self.link.send(ContainerAnswer(command.request_id, answer))

    async def _reload_volumes(self, container: WorkerContainer | None) -> None:
        if container is None or container.running is None:
            raise FailedPrecondition("the container is not running")
        if self._volume_rpcs is not None:
            for volume in container.spec.volumes:
                request = api_pb2.VolumeReloadRequest(volume_id=volume.volume_id)
                await self._volume_rpcs.VolumeReload(request, container.task_id)

    # ---- images -----------------------------------------------------------------------------------------

    def _prepare(self, command: PrepareImage) -> None:
        if command in self._preparing:
            return
        work = self._runtime.prepare(command.image_id, command.sdk_version, command.builder_version)
        self._preparing[command] = task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._preparing.pop(command, None))

    def _build(self, command: BuildImage) -> None:
        """One build of an image at a time. A build that is asked for again goes on, or says how it ended."""
        image_id = command.image_id
        if (built := self._built.get(command.build_id)) is not None:
            self.link.send(built)
            return
        before = self._builds.get(image_id)
        if before is not None:
            if before.build_id == command.build_id:
                return
            before.task.cancel()
        task = asyncio.create_task(self._run_build(command, before), name=f"build-{image_id}")
        running = self._builds[image_id] = _Running(command.build_id, task)

        def forget(_: asyncio.Task) -> None:
            if self._builds.get(image_id) is running:
                del self._builds[image_id]

        task.add_done_callback(forget)

    def _cancel_build(self, command: CancelBuild) -> None:
        running = self._builds.get(command.image_id)
        if running is not None and running.build_id == command.build_id:
            running.task.cancel()

    async def _run_build(self, command: BuildImage, before: "_Running | None") -> None:
        image_id, build_id = command.image_id, command.build_id
        if before is not None:
            await asyncio.wait({before.task})

        def on_log(fd: int, text: str) -> None:
            self._logs.put_now([LogLine(fd, time.time(), text)], image_id=image_id)

        try:
            spec = msgspec.msgpack.decode(command.spec, type=ImageSpec)
            info = await self._builder.build(image_id, spec, command.env, on_log, force=command.force)
            built = ImageBuilt(image_id, info=info, build_id=build_id)
        except AeolianError as error:
            built = ImageBuilt(image_id, error=error.message, build_id=build_id)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("image %s could not be built", image_id)
            built = ImageBuilt(image_id, error=f"the build failed inside the worker: {error!r}", build_id=build_id)
        self._tell_built(built)

    async def _save_image(self, container: WorkerContainer, upper: Path | None) -> None:
        """A build function has ended: what its container wrote becomes the image, if it ended well."""
        spec = container.spec
        image_id, build_id = spec.save_image_as, spec.build_id
        if not container.has_succeeded:
            return
        try:
            if upper is None:
                raise FailedPrecondition(f"the {self._runtime.name} runtime cannot keep what a container wrote")
            await self._images.commit_upper(image_id, spec.image_id, upper)
            built = ImageBuilt(image_id, info=self._images.get(image_id).info, build_id=build_id)
        except AeolianError as error:
            built = ImageBuilt(image_id, error=error.message, build_id=build_id)
        except Exception as error:
            log.exception("%s: what it wrote could not be kept as image %s", spec.task_id, image_id)
            built = ImageBuilt(image_id, error=f"the worker could not keep the files: {error!r}", build_id=build_id)
        self._tell_built(built)

    def _tell_built(self, built: ImageBuilt) -> None:
        """Now, and after each reconnection."""
        self._built[built.build_id] = built
        while len(self._built) > MAX_ENDS_KEPT:
            self._built.pop(next(iter(self._built)))
        self.link.send(built)


def _memory_mb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
