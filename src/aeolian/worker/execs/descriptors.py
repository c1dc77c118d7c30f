"""Reading and writing pipes and terminals that do not block, for asyncio: one call, one wait, nothing left behind."""

import asyncio
import errno
import os


async def read_some(descriptor: int, max_bytes: int) -> bytes:
    """At least a byte; b"" at the end, which a terminal tells as an error."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return os.read(descriptor, max_bytes)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""
        readable = loop.create_future()
        loop.add_reader(descriptor, _wake, readable)
        try:
            await readable
        finally:
            loop.remove_reader(descriptor)


async def until_writable(descriptor: int, wait_s: float, ended: asyncio.Future) -> bool:
    """Whether it can be written to, or `ended` is done, before `wait_s` have passed."""
    if wait_s <= 0:
        return False
    loop = asyncio.get_running_loop()
    # A copy: one selector cannot watch the same terminal for both directions by two owners.
    copy = os.dup(descriptor)
    writable = loop.create_future()
    loop.add_writer(copy, _wake, writable)
    try:
        done, _ = await asyncio.wait({writable, ended}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        loop.remove_writer(copy)
        os.close(copy)


def _wake(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)
