"""Bodies of requests as they come, and no longer waited for than a living client needs."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from aeolian.domain.errors import RequestStalled

STALL_S = 10.0


async def chunks_of(request: web.Request, *, stall_s: float = STALL_S) -> AsyncIterator[bytes]:
    """The body, piece by piece. Raises RequestStalled when nothing comes for `stall_s` seconds.

    The official client can send less than it announced: when a connection breaks while a thread of it reads the next
    16 MiB of an upload, its next attempt begins where that thread ended, and then waits for an answer without end
    (`BytesIOSegmentPayload` of modal 1.4 to 1.6). Any error makes it send the whole once more.
    """
    while True:
        try:
            async with asyncio.timeout(stall_s):
                chunk = await request.content.readany()
        except TimeoutError as error:
            raise RequestStalled(f"nothing came for {stall_s:g} s in the middle of the body: send it again") from error
        if not chunk:
            return
        yield chunk


async def text_of(request: web.Request, *, max_bytes: int, stall_s: float = STALL_S) -> str:
    """A small body as a whole. Raises RequestStalled, and HTTP 413 and 400 for what is too large or not UTF-8."""
    body = bytearray()
    async for chunk in chunks_of(request, stall_s=stall_s):
        body += chunk
        if len(body) > max_bytes:
            raise web.HTTPRequestEntityTooLarge(max_size=max_bytes, actual_size=len(body))
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise web.HTTPBadRequest(reason="the body is not UTF-8") from error
