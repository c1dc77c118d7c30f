"""Standby containers: started ahead, with the SDK imported, and made into the next container of their kind.

A standby is a whole container of an image, confined like any other, that belongs to nobody: it holds no secret, no
Volume, no user code. When a container of its kind is to start, everything that is its own is added from outside::

    standby                                        container
    root: the image                                root: Mounts over the image, binds (new_root.py)
    cgroup: least share of the CPU                 its limits
    environment: the image's                       its variables, by a socket that is then closed
    waiting, the SDK imported      -------->       the SDK's entrypoint reads its arguments

Each serves one container, so nothing is shared by two: not even a hash seed. As many of a kind are kept as were started
together lately, up to a number for all kinds; without one, or where it does not fit (standby_fit.py), a container starts
cold, and the next finds one.
"""

import asyncio
import itertools
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import psutil

from aeolian.domain.containers import ContainerSpec, Resources
from aeolian.domain.errors import AeolianError, FailedPrecondition, Unavailable
from aeolian.worker.hooks.base import Bind, Hook, Start
from aeolian.worker.images.overlay_files import remove_tree
from aeolian.worker.images.store import ImageStore
from aeolian.worker.runtimes.kept_container import KeptContainer
from aeolian.worker.runtimes.standby_fit import ENTRYPOINT_ARGV, Kind, Report, changed_variable, kind_of, misfit
from aeolian.worker.runtimes.wiring import EVERYWHERE

log = logging.getLogger(__name__)

MAX_STANDBYS = 4
"""One holds about 45 MB."""
MIN_AVAILABLE_BYTES = 512 << 20
"""With less memory to be had, the host has none to spare for standbys."""
OOM_SCORE_ADJ = 1000
"""A host that runs out of memory ends standbys first."""
SETTLE_S = 0.1
"""After a start, before the next standby is made: it would take the CPU from the container that was just started."""
MAX_SETTLE_S = 1.0
READY_TIMEOUT_S = 120.0
TELL_TIMEOUT_S = 10.0
MAX_REPORT_BYTES = 1 << 20
MAX_UNFIT = 1000
SCRIPTS = tuple(Path(__file__).with_name(name) for name in ("standby_main.py", "preloaded.py"))
FOLDER = "/__modal/standby"
OWN_ENV = {"MODAL_IS_REMOTE": "1", **EVERYWHERE}
"""What every container that runs the SDK has in its environment."""
LEAST = Resources(milli_cpu=1)

Launch = Callable[[Start, list[str], int], Awaitable[KeptContainer]]
"""(start, argv, stdin): start a container that waits for its assignment."""


class Unprepared(Exception):
    """Containers of this kind have to start cold; the message says why."""


class Standby:
    """One container without an owner, and all that belongs to it."""

    def __init__(self, kind: Kind, start: Start):
        self.kind = kind
        self.start = start
        self.env_at_hook: dict[str, str] = {}
        """Its environment when the pool's hook came."""
        self.env: dict[str, str] = {}
        """Its whole environment."""
        self.report: Report | None = None
        self.container: KeptContainer | None = None
        self.applied: list[Hook] = []
        self.taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_settled = asyncio.Event()
        """It is ready, or cannot be made."""
        self.socket, self.stdin = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.task: asyncio.Task

    async def read_report(self) -> Report:
        """Raises Unprepared when the image's Python cannot be, Unavailable when it has died."""
        loop, line = asyncio.get_running_loop(), b""
        while not line.endswith(b"\n"):
            chunk = await loop.sock_recv(self.socket, 1 << 16)
            if not chunk or len(line) > MAX_REPORT_BYTES:
                raise Unavailable("its interpreter ended")
            line += chunk
        try:
            report = msgspec.json.decode(line, type=Report)
        except msgspec.MsgspecError as error:
            raise Unprepared(f"its interpreter says what is no report: {error}") from error
        if not report.ready:
            raise Unprepared(report.reason.strip() or "no reason was given")
        return report

    def check_fits(self, env: Mapping[str, str], network_namespace: Path | None) -> None:
        """`env`: the container's whole environment. Raises FailedPrecondition."""
        assert self.report is not None, "it is ready"
        why_not = changed_variable(self.report, self.env, env)
        if not why_not and network_namespace != self.start.network_namespace:
            why_not = "the container has another network"
        if why_not:
            raise FailedPrecondition(why_not)

    async def tell(self, argv: Sequence[str], env: Mapping[str, str], cwd: str, *, is_entrypoint: bool) -> None:
        """Let it go on as the container that it has become."""
        request = {"argv": list(argv), "env": dict(env), "cwd": cwd, "is_entrypoint": is_entrypoint}
        data = json.dumps(request).encode() + b"\n"
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(self.socket, data), TELL_TIMEOUT_S)
        self.socket.close()

    async def end(self) -> None:
        """Kill it. Never raises; may be called again."""
        self.socket.close()
        self.stdin.close()
        if (container := self.container) is not None:
            container.kill()
            await container.wait()
            await container.release()

    async def dispose(self) -> None:
        """End it, and undo what was prepared for it. Never raises; may be called again."""
        await self.end()
        for hook in reversed(self.applied):
            await hook.undo(self.start)
        self.applied.clear()
        await asyncio.to_thread(remove_tree, self.start.folder)


class Standbys:
    """Those of one runtime. Also the start hook `standby`, which finds the one for a container."""

    name = "standby"

    def __init__(
        self,
        images: ImageStore,
        containers: Path,
        hooks: Callable[[], list[Hook]],
        launch: Launch,
        *,
        max_standbys: int = MAX_STANDBYS,
        available_bytes: Callable[[], int] = lambda: psutil.virtual_memory().available,
        kind_of: Callable = kind_of,
    ):
        """`containers`: where their folders are made; `hooks`: what prepares a container, this hook included."""
        self._images = images
        self._containers = containers
        self._hooks = hooks
        self._launch = launch
        self._max = max_standbys
        self._available_bytes = available_bytes
        self._kind_of = kind_of
        self._standbys: list[Standby] = []
        """Those without an owner, the least recently used kind first; some are not ready yet."""
        self._wanted: dict[Kind, tuple[ContainerSpec, int]] = {}
        """How many of which kind."""
        self._unfit: dict[Kind, str] = {}
        self._taken: dict[str, Standby] = {}
        """By the container that has one."""
        self._by_start: dict[str, Standby] = {}
        """Those that are being prepared, by their own ids."""
        self._tasks: set[asyncio.Task] = set()
        self._one_at_a_time = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self._settled_at = 0.0
        self._is_closed = False

    def all(self) -> list[Standby]:
        """Those without an owner, the least recently used first; some may not be ready yet."""
        return list(self._standbys)

    # ---- as a hook of a container's start -------------------------------------------------------------------

    async def apply(self, start: Start) -> None:
        task_id = start.spec.task_id
        if (own := self._by_start.get(task_id)) is not None:
            own.env_at_hook = dict(start.env)
            return
        if not self._max:
            return
        kind = self._kind_of(start.spec, self._images.get(start.spec.image_id))
        if kind is None:
            return
        standby = next((it for it in self._standbys if it.kind == kind and it.report is not None), None)
        if standby is not None and standby.report is not None:
            targets = [mount.path for mount in start.spec.volumes]
            wanted = {**EVERYWHERE, **start.env}
            why_not = misfit(standby.report, standby.env_at_hook, wanted, start.layers, targets)
            if why_not:
                log.debug("%s starts cold: %s", task_id, why_not)
                return
            self._standbys.remove(standby)
            self._taken[task_id] = standby
            standby.taken.set_result(None)
            start.network_namespace = standby.start.network_namespace
        self.want(kind, start.spec)

    async def undo(self, start: Start) -> None:
        if (standby := self._taken.pop(start.spec.task_id, None)) is not None:
            await standby.dispose()

    def taken_by(self, task_id: str) -> Standby | None:
        """The standby that this container is to be made of."""
        return self._taken.get(task_id)

    # ---- having them ready ----------------------------------------------------------------------------------

    def want(self, kind: Kind, spec: ContainerSpec) -> None:
        """Have one more of this kind ready, soon."""
        if not self._max or self._is_closed or kind in self._unfit:
            return
        _, count = self._wanted.pop(kind, (spec, 0))
        self._wanted[kind] = (spec, count + 1)
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._settled_at = loop.time() + MAX_SETTLE_S
        else:
            self._timer.cancel()
        self._timer = loop.call_at(min(loop.time() + SETTLE_S, self._settled_at), self._make_wanted)

    async def prepare(self, spec: ContainerSpec) -> None:
        """Have one ready for containers of this specification; returns when it is, or cannot be made."""
        kind = self._kind_of(spec, self._images.get(spec.image_id))
        if kind is None or not self._max or self._is_closed or kind in self._unfit:
            return
        self._wanted.setdefault(kind, (spec, 1))
        self._make_wanted()
        if (standby := next((it for it in self._standbys if it.kind == kind), None)) is not None:
            await standby.is_settled.wait()

    async def close(self) -> None:
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._drop(self._standbys)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for standby in self._taken.values():
            await standby.dispose()
        self._taken.clear()

    def _make_wanted(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wanted, self._wanted = self._wanted, {}
        if self._available_bytes() < MIN_AVAILABLE_BYTES:
            log.info("the host is short of memory: no containers are started ahead")
            self._drop(self._standbys)
            return
        for kind, (spec, count) in wanted.items():
            self._drop(
                [it for it in self._standbys if it.kind.image_id == kind.image_id and it.kind.image != kind.image]
            )
            self._standbys.sort(key=lambda standby: standby.kind == kind)
            num_there = sum(standby.kind == kind for standby in self._standbys)
            for _ in range(min(count, self._max) - num_there):
                self._drop(self._standbys[: len(self._standbys) + 1 - self._max])
                self._make(kind, spec)

    def _make(self, kind: Kind, spec: ContainerSpec) -> None:
        task_id = f"standby-{next(self._numbers)}"
        bare = ContainerSpec(
            task_id,
            app_id="",
            function_id="",
            environment_name="",
            image_id=kind.image_id,
            env=OWN_ENV,
            cwd=spec.cwd,
            resources=msgspec.structs.replace(LEAST, gpu_count=int(kind.has_gpus)),
            sdk_version=kind.sdk_version,
            builder_version=kind.builder_version,
            mount_client_dependencies=kind.mount_client_dependencies,
            block_network=kind.block_network,
        )
        folder = self._containers / task_id
        start = Start(bare, folder, folder / "none", env=dict(bare.env), cwd=bare.cwd)
        standby = self._by_start[task_id] = Standby(kind, start)
        self._standbys.append(standby)
        standby.task = asyncio.create_task(self._live(standby), name=task_id)
        self._tasks.add(standby.task)
        standby.task.add_done_callback(self._tasks.discard)

    def _drop(self, standbys: Sequence[Standby]) -> None:
        for standby in list(standbys):
            self._standbys.remove(standby)
            standby.task.cancel()

    async def _live(self, standby: Standby) -> None:
        """Prepare it, and keep it until it is taken; its owner until then."""
        try:
            async with self._one_at_a_time, asyncio.timeout(READY_TIMEOUT_S):
                container = await self._prepare(standby)
            standby.is_settled.set()
            await asyncio.wait({standby.taken, container.exited}, return_when=asyncio.FIRST_COMPLETED)
        except (Unprepared, TimeoutError) as error:
            self._give_up(standby.kind, str(error) or f"it was not ready within {READY_TIMEOUT_S:g} s")
        except (AeolianError, OSError) as error:
            log.warning("no container of %s could be started ahead: %s", standby.kind.image_id, error)
        finally:
            standby.is_settled.set()
            self._by_start.pop(standby.start.spec.task_id, None)
            if not standby.taken.done():
                if standby in self._standbys:
                    self._standbys.remove(standby)
                await standby.dispose()

    async def _prepare(self, standby: Standby) -> KeptContainer:
        start = standby.start
        await asyncio.to_thread(start.folder.mkdir, parents=True, exist_ok=True)
        for hook in self._hooks():
            standby.applied.append(hook)
            await hook.apply(start)
        standby.env = dict(start.env)
        start.binds += [Bind(script, f"{FOLDER}/{script.name}") for script in SCRIPTS]
        argv = [start.python, f"{FOLDER}/{SCRIPTS[0].name}", *ENTRYPOINT_ARGV[1:]]
        standby.container = await self._launch(start, argv, standby.stdin.fileno())
        standby.stdin.close()
        standby.report = await standby.read_report()
        return standby.container

    def _give_up(self, kind: Kind, why: str) -> None:
        log.info("containers of %s cannot be started ahead: %s", kind.image_id, why.splitlines()[-1])
        self._unfit[kind] = why
        while len(self._unfit) > MAX_UNFIT:
            del self._unfit[next(iter(self._unfit))]
