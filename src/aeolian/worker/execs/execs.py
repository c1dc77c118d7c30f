"""All commands in the containers of one worker, by container and id; those that ended are kept for a while."""

import asyncio
from pathlib import Path

from aeolian.domain.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable
from aeolian.domain.execs import (
    Answer,
    AskStdin,
    AwaitExec,
    Done,
    Ended,
    Output,
    ReadExec,
    Request,
    StartExec,
    WriteExec,
)
from aeolian.worker.execs.exec import Exec
from aeolian.worker.images.overlay_files import remove_tree
from aeolian.worker.runtimes.base import RunningContainer

KEPT_S = 600.0
"""After its end: how long what a command wrote can be read."""
MAX_RUNNING = 256
"""In one container."""
MAX_KEPT = 1000
"""In one container, running ones among them."""
MAX_ID_CHARS = 200
MAX_WAIT_S = 30.0

Key = tuple[str, str]


class Execs:
    def __init__(self, folder: Path):
        """`folder`: for output."""
        self._folder = folder
        self._execs: dict[Key, Exec] = {}
        """The oldest first."""
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._closing: set[asyncio.Task] = set()

    async def open(self) -> None:
        await asyncio.to_thread(remove_tree, self._folder)
        self._folder.mkdir(mode=0o700, parents=True)

    async def close(self) -> None:
        for key in list(self._execs):
            self._forget(key)
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def answer(self, task_id: str, container: RunningContainer | None, request: Request) -> Answer:
        """`container`: None when it does not run (yet, or any more). Raises an AeolianError."""
        match request:
            case StartExec():
                await self._start(task_id, container, request).started()
                return Done()
            case ReadExec():
                found = self._find(task_id, request.exec_id)
                data, is_over = await found.read(request.fd, request.offset, min(request.wait_s, MAX_WAIT_S))
                return Output(data, is_over)
            case WriteExec():
                found = self._find(task_id, request.exec_id)
                wait_s = min(request.wait_s, MAX_WAIT_S)
                return await found.write(request.offset, request.data, request.is_last, wait_s)
            case AskStdin():
                return self._find(task_id, request.exec_id).stdin
            case AwaitExec():
                found = self._find(task_id, request.exec_id)
                return Ended(await found.ended(min(request.wait_s, MAX_WAIT_S)))
        raise InvalidArgument(f"{type(request).__name__} is nothing that concerns commands")

    def container_ended(self, task_id: str) -> None:
        """Its commands end with it; what they wrote can still be read."""
        for key, found in self._execs.items():
            if key[0] == task_id:
                found.kill()

    def _start(self, task_id: str, container: RunningContainer | None, request: StartExec) -> Exec:
        key = (task_id, request.exec_id)
        if (found := self._execs.get(key)) is not None:
            return found
        if not request.exec_id or len(request.exec_id) > MAX_ID_CHARS:
            raise InvalidArgument(f"the id of a command has 1 to {MAX_ID_CHARS} characters, not {len(request.exec_id)}")
        if container is None:
            raise Unavailable(f"container {task_id} is not running (yet): try again in a moment")
        self._make_room(task_id)
        found = self._execs[key] = Exec(request, container, self._folder, lambda: self._over(key))
        return found

    def _find(self, task_id: str, exec_id: str) -> Exec:
        found = self._execs.get((task_id, exec_id))
        if found is None:
            raise NotFound(
                f"no command {exec_id!r} is known in container {task_id}: it never started here, its worker was started "
                f"anew, or it ended more than {KEPT_S / 60:.0f} minutes ago"
            )
        return found

    def _make_room(self, task_id: str) -> None:
        of_container = [(key, found) for key, found in self._execs.items() if key[0] == task_id]
        if sum(not found.is_over for _, found in of_container) >= MAX_RUNNING:
            raise ResourceExhausted(f"{MAX_RUNNING} commands run in container {task_id}, which is the limit")
        over = [key for key, found in of_container if found.is_over]
        for key in over[: max(0, len(of_container) + 1 - MAX_KEPT)]:
            self._forget(key)

    def _over(self, key: Key) -> None:
        if key in self._execs:
            self._timers[key] = asyncio.get_running_loop().call_later(KEPT_S, self._forget, key)

    def _forget(self, key: Key) -> None:
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()
        task = asyncio.create_task(self._execs.pop(key).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
