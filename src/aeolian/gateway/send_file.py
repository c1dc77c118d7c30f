"""Sends a slice of a file, by the kernel where it can, honouring Range and HEAD."""

import asyncio
import os
from pathlib import Path
from typing import NoReturn

from aiohttp import web

from aeolian.domain.errors import NotFound

PIECE_BYTES = 512 << 10
SENDFILE_FROM_BYTES = 64 << 10


async def send_file(
    request: web.Request,
    path: Path,
    *,
    offset: int = 0,
    length: int | None = None,
    headers: dict[str, str] | None = None,
) -> web.StreamResponse:
    """Answer with bytes `offset … offset+length` of a file as one resource. A Range applies within them."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"{request.path} is no longer here") from None
    try:
        size = os.fstat(descriptor).st_size
        length = max(0, min(size - offset, size if length is None else length))
        return await _send(request, descriptor, offset, length, headers or {})
    finally:
        os.close(descriptor)


async def _send(
    request: web.Request, descriptor: int, offset: int, length: int, headers: dict[str, str]
) -> web.StreamResponse:
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    status, first, stop = 200, 0, length
    if "Range" in request.headers:
        try:
            asked = request.http_range
            first, stop, _step = slice(asked.start, asked.stop).indices(length)
        except ValueError:
            first, stop = length, length
        if first >= stop:
            return web.Response(status=416, headers={"Content-Range": f"bytes */{length}"})
        status = 206
        headers["Content-Range"] = f"bytes {first}-{stop - 1}/{length}"
    response = web.StreamResponse(status=status, headers=headers)
    response.content_length = stop - first
    await response.prepare(request)
    if request.method != "HEAD" and stop > first:
        await _copy(request, response, descriptor, offset + first, stop - first)
    await response.write_eof()
    return response


async def _copy(request: web.Request, response: web.StreamResponse, descriptor: int, offset: int, count: int) -> None:
    transport = request.transport
    if count >= SENDFILE_FROM_BYTES and transport is not None:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            try:
                # fallback=False: a loop without sendfile (uvloop) says so before a byte has left.
                sent = await asyncio.get_running_loop().sendfile(transport, file, offset, count, fallback=False)
                if sent < count:
                    _break_off(transport)
                return
            except (NotImplementedError, asyncio.SendfileNotAvailableError):
                pass
    while count > 0:
        data = await asyncio.to_thread(os.pread, descriptor, min(PIECE_BYTES, count), offset)
        if not data:
            _break_off(transport)
        await response.write(data)
        offset, count = offset + len(data), count - len(data)


def _break_off(transport: asyncio.Transport | None) -> NoReturn:
    """The announced length cannot be kept: the client must see a broken connection, not a short file."""
    if transport is not None:
        transport.abort()
    raise ConnectionResetError("the file became shorter while it was sent")
