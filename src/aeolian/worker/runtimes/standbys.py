"""The standbys of a node (standby.py): how many are kept, of which kinds, and which container gets one.

As many of a kind are kept as were started together lately, up to a number for all kinds. A container that finds none, or
that none fits (standby_fit.py), starts cold, and the next one finds one.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from aeolian.domain.containers import ContainerSpec, Resources
from aeolian.domain.errors import AeolianError
from aeolian.worker.hooks.base import Bind, Hook, Start
from aeolian.worker.images.store import ImageStore
from aeolian.worker.runtimes.kept_container import KeptContainer
from aeolian.worker.runtimes.standby import Known, Standby, Unprepared
from aeolian.worker.runtimes.standby_fit import ENTRYPOINT_ARGV, Kind, kind_of
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
MAX_WAIT_S = 5.0
"""A container waits for a standby that is on its way: it is ready sooner than one that starts now, unless it hangs."""
MAX_KINDS_KNOWN = 1000
SCRIPTS = tuple(Path(__file__).with_name(name) for name in ("standby_main.py", "preloaded.py"))
FOLDER = "/__modal/standby"
OWN_ENV = {"MODAL_IS_REMOTE": "1", **EVERYWHERE}
"""What every container that runs the SDK has in its environment."""
LEAST, QUICK = Resources(milli_cpu=1), Resources(milli_cpu=1000)
"""Its share of the CPU until a container waits for it, and then."""

Launch = Callable[[Start, list[str], int], Awaitable[KeptContainer]]
"""(start, argv, stdin): start a container that waits for its assignment."""
Limit = Callable[[Start, Resources], Awaitable[None]]
"""Change what a running container may use of the CPU."""


class Standbys:
    """Those of one runtime. Also the start hook `standby`, which finds the one for a container."""

    name = "standby"

    def __init__(
        self,
        images: ImageStore,
        containers: Path,
        hooks: Callable[[], list[Hook]],
        launch: Launch,
        limit: Limit,
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
        self._limit = limit
        self._max = max_standbys
        self._available_bytes = available_bytes
        self._kind_of = kind_of
        self._standbys: list[Standby] = []
        """Those without an owner, the least recently used kind first; some are not ready yet."""
        self._wanted: dict[Kind, tuple[ContainerSpec, int]] = {}
        """How many of which kind."""
        self._unfit: dict[Kind, str] = {}
        self._known: dict[Kind, Known] = {}
        """What the last one of each kind has reported: it holds for the next one, too."""
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
        known = self._known.get(kind)
        why_not = known.misfit(start) if known is not None else ""
        standby = None if why_not else await self._find(kind)
        if standby is not None and standby.report is not None:
            why_not = Known(standby.report, standby.env_at_hook).misfit(start)
        if why_not:
            log.debug("%s starts cold: %s", task_id, why_not)
            return
        if standby is not None:
            self._standbys.remove(standby)
            self._taken[task_id] = standby
            standby.taken.set_result(None)
            start.network_namespace = standby.start.network_namespace
        self.want(kind, start.spec)

    async def _find(self, kind: Kind) -> Standby | None:
        """One that is ready, or will be soon."""
        of_kind = [it for it in self._standbys if it.kind == kind and not it.is_waited_for]
        for standby in of_kind:
            if standby.report is not None:
                return standby
        standby = next((it for it in of_kind if it.is_launched.is_set()), None)
        if standby is None:
            return None
        standby.is_waited_for = True
        try:
            await self._limit(standby.start, QUICK)
            async with asyncio.timeout(MAX_WAIT_S):
                await standby.is_settled.wait()
        except (TimeoutError, OSError):
            return None  # nobody else waits for it
        except asyncio.CancelledError:
            standby.is_waited_for = False
            raise
        standby.is_waited_for = False
        return standby if standby.report is not None and standby in self._standbys else None

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
        standby.is_launched.set()
        standby.report = await standby.read_report()
        _remember(self._known, standby.kind, Known(standby.report, standby.env_at_hook))
        return standby.container

    def _give_up(self, kind: Kind, why: str) -> None:
        log.info("containers of %s cannot be started ahead: %s", kind.image_id, why.splitlines()[-1])
        _remember(self._unfit, kind, why)


def _remember(known: dict[Kind, Any], kind: Kind, thing: Any) -> None:
    known.pop(kind, None)
    known[kind] = thing
    while len(known) > MAX_KINDS_KNOWN:
        del known[next(iter(known))]
