"""One command in a container: its output is kept for readers, its input passed on, its end remembered.

::

    client's bytes --offset--> stdin  -->  command  --> stdout, stderr --> Spool --offset--> readers
"""

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

from aeolian.domain.errors import AeolianError, FailedPrecondition, InvalidArgument, Unavailable
from aeolian.domain.execs import StartExec, Stdin
from aeolian.worker.execs.descriptors import read_some, until_writable
from aeolian.worker.execs.spool import Spool
from aeolian.worker.runtimes.base import RunningContainer
from aeolian.worker.runtimes.entering import EnteredCommand

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 << 10
DRAIN_S = 2.0
"""After the command's end: how long what it left behind may go on writing."""
MAX_LEFT_BYTES = 1 << 20
READER_SILENT_S = 3.0
END_OF_INPUT = b"\x04"
"""What a terminal takes for it."""
LOST = -9
"""As if killed: of what never ran, or whose end was not seen."""


class Exec:
    """`on_over()` is called when it has ended, or could not be started."""

    def __init__(self, request: StartExec, container: RunningContainer, folder: Path, on_over: Callable[[], None]):
        self._request = request
        self._container = container
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._spools = {1: Spool(folder), 2: Spool(folder)}
        self._entered: EnteredCommand | None = None
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._num_written = 0
        self._is_stdin_closed = False
        self._writing = asyncio.Lock()
        self._heard_at = self._loop.time()
        self._being_read: set[int] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._task = asyncio.create_task(self._live(), name=f"exec-{request.exec_id}")

    @property
    def is_over(self) -> bool:
        return self._ended.done()

    async def started(self) -> None:
        """Raises what kept it from starting."""
        await asyncio.shield(self._started)

    async def read(self, fd: int, offset: int, wait_s: float) -> tuple[bytes, bool]:
        """Output from this byte on, and whether there is none and never will be. Raises InvalidArgument, NotFound."""
        if fd not in self._spools:
            raise InvalidArgument(f"a command has no output {fd}: 1 is stdout, 2 is stderr")
        self._heard_at = self._loop.time()
        self._being_read.add(fd)
        spool = self._spools[fd]
        data = await spool.read(offset, CHUNK_BYTES, wait_s)
        self._heard_at = self._loop.time()
        return data, spool.is_over and offset >= spool.end

    async def write(self, offset: int, data: bytes, is_last: bool, wait_s: float) -> Stdin:
        """Pass input on, as far as the command takes it within `wait_s`. Raises InvalidArgument for a gap.

        What comes after the command's end goes nowhere, and is no error: its sender cannot have known.
        """
        until = self._loop.time() + wait_s
        async with self._writing:
            if offset > self._num_written and not self._takes_no_input:
                raise InvalidArgument(
                    f"input from byte {offset:,} cannot follow byte {self._num_written:,}: send what lies between first"
                )
            left = data[max(0, self._num_written - offset) :]
            while left and not self._takes_no_input:
                assert self._entered is not None
                try:
                    count = os.write(self._entered.stdin, left)
                except BlockingIOError:
                    if not await until_writable(self._entered.stdin, until - self._loop.time(), self._ended):
                        return self.stdin
                    continue
                except OSError:  # it reads no more
                    self._is_stdin_closed = True
                    break
                self._num_written += count
                left = left[count:]
            if self._takes_no_input:
                return Stdin(max(self._num_written, offset + len(data)), is_closed=True)
            if is_last:
                self._close_stdin()
            return self.stdin

    @property
    def stdin(self) -> Stdin:
        return Stdin(self._num_written, self._takes_no_input)

    async def ended(self, wait_s: float) -> int | None:
        """Its exit code, negative for a signal; None: it still runs after `wait_s`.

        Who waits is told when those who read its output have all of it: the client's commands leave at once.
        """
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await asyncio.shield(self._ended)
                    await self._all_read()
        return self._ended.result() if self._ended.done() else None

    async def _all_read(self) -> None:
        """Until all output is read, or its readers have been silent for a while."""
        unread = [self._spools[fd] for fd in self._being_read if not self._spools[fd].is_read.is_set()]
        reading = asyncio.gather(*(spool.is_read.wait() for spool in unread))
        try:
            while not reading.done() and (left_s := self._heard_at + READER_SILENT_S - self._loop.time()) > 0:
                await asyncio.wait({reading}, timeout=left_s)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def kill(self) -> None:
        if self._entered is not None:
            self._entered.kill()

    async def close(self) -> None:
        """Kill it where it still runs, and forget what it wrote."""
        self.kill()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for spool in self._spools.values():
            spool.close()

    # ---- its life ---------------------------------------------------------------------------------------

    async def _live(self) -> None:
        exit_code = LOST
        try:
            self._entered = entered = await self._container.exec(self._request.command)
            self._started.set_result(None)
            self._set_timers()
            exit_code = await self._run(entered)
        except AeolianError as error:
            self._refuse(error)
        except asyncio.CancelledError:
            self._refuse(Unavailable("the worker is shutting down"))
            raise
        except Exception as error:
            log.exception("a command in a container failed inside the worker")
            self._refuse(FailedPrecondition(f"the worker failed to run the command: {error!r}"))
        finally:
            for timer in self._timers.values():
                timer.cancel()
            if self._entered is not None:
                self._entered.close()
            for spool in self._spools.values():
                spool.finish()
            self._ended.set_result(exit_code)
            self._on_over()

    def _refuse(self, error: AeolianError) -> None:
        if not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # seen, also where nobody waits any more

    async def _run(self, entered: EnteredCommand) -> int:
        request, spools = self._request, self._spools
        wanted = {1: spools[1] if request.keeps_stdout else None, 2: spools[2] if request.keeps_stderr else None}
        if request.joins_stderr:
            wanted[2] = wanted[1]
        outputs = {1: entered.stdout, 2: entered.stderr}
        pumps = [
            asyncio.create_task(self._pump(descriptor, wanted[fd]))
            for fd, descriptor in outputs.items()
            if descriptor != -1
        ]
        try:
            exit_code = await entered.wait()
            self._is_stdin_closed = True
            await asyncio.wait(pumps, timeout=DRAIN_S)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        for fd, descriptor in outputs.items():
            if descriptor != -1:
                _take_the_rest(descriptor, wanted[fd])
        if request.command.terminal is not None and not spools[1].end and entered.complaint:
            spools[1].write(entered.complaint.encode() + b"\r\n")
        return exit_code

    async def _pump(self, descriptor: int, spool: Spool | None) -> None:
        """Until the end of the output. What is not wanted is read all the same: the command must not wait for it."""
        while True:
            if spool is not None:
                await spool.has_room.wait()
            data = await read_some(descriptor, CHUNK_BYTES)
            if not data:
                return
            if spool is not None:
                try:
                    spool.write(data)
                except OSError as error:
                    log.error("output of a command cannot be kept (%s): it is ended", error.strerror)
                    self.kill()
                    return

    def _close_stdin(self) -> None:
        assert self._entered is not None
        self._is_stdin_closed = True
        if self._request.command.terminal is None:
            self._entered.close_stdin()
        else:
            with contextlib.suppress(OSError):
                os.write(self._entered.stdin, END_OF_INPUT)

    @property
    def _takes_no_input(self) -> bool:
        return self._is_stdin_closed or self._ended.done()

    # ---- ending it --------------------------------------------------------------------------------------

    def _set_timers(self) -> None:
        if self._request.timeout_s:
            self._timers["timeout"] = self._loop.call_later(self._request.timeout_s, self.kill)
        if self._request.unattended_s:
            self._look_for_attendants()

    def _look_for_attendants(self) -> None:
        """Ends a terminal that its user has left."""
        left_s = self._heard_at + self._request.unattended_s - self._loop.time()
        if left_s <= 0:
            log.info("a terminal in a container has been left by its user: it is ended")
            self.kill()
            return
        self._timers["unattended"] = self._loop.call_later(left_s, self._look_for_attendants)


def _take_the_rest(descriptor: int, spool: Spool | None) -> None:
    """What lies in a pipe that something in the container still holds open."""
    num_left = MAX_LEFT_BYTES
    try:
        while num_left > 0 and (data := os.read(descriptor, min(num_left, CHUNK_BYTES))):
            num_left -= len(data)
            if spool is not None:
                spool.write(data)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EIO):
            log.error("the last output of a command cannot be kept: %s", error.strerror)
