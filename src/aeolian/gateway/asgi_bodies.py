"""Bodies of answers: small ones come inside their message, very large ones as a blob that is never read whole."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from modal_proto import api_pb2

PIECE_BYTES = 512 << 10
HEAD_BYTES = 64
"""The beginning of a message up to its body: two tags and two lengths."""
_RESPONSE_BODY = api_pb2.Asgi.HTTP_RESPONSE_BODY_FIELD_NUMBER << 3 | 2
_BODY = api_pb2.Asgi.HttpResponseBody.BODY_FIELD_NUMBER << 3 | 2


class Blobs(Protocol):
    async def open_path(self, blob_id: str) -> Path: ...

    async def delete(self, blob_id: str) -> None: ...


@contextlib.asynccontextmanager
async def delete_after(blobs: Blobs, blob_id: str) -> AsyncIterator[tuple[api_pb2.Asgi, Path | None]]:
    """The message in a blob; where it is a body, without that, and with the file it is in. Then the blob goes."""
    path = await blobs.open_path(blob_id)
    try:
        yield await asyncio.to_thread(_read, path)
    finally:
        await blobs.delete(blob_id)


async def body_pieces(message: api_pb2.Asgi.HttpResponseBody, path: Path | None) -> AsyncIterator[bytes]:
    if path is None:
        yield message.body
        return
    place = await asyncio.to_thread(_place_of_body, path)
    assert place is not None
    offset, end = place
    with await asyncio.to_thread(path.open, "rb") as file:
        file.seek(offset)
        while offset < end:
            piece = await asyncio.to_thread(file.read, min(PIECE_BYTES, end - offset))
            if not piece:
                return
            offset += len(piece)
            yield piece


def _read(path: Path) -> tuple[api_pb2.Asgi, Path | None]:
    place = _place_of_body(path)
    if place is None:
        return api_pb2.Asgi.FromString(path.read_bytes()), None
    with path.open("rb") as file:
        file.seek(place[1])
        rest = api_pb2.Asgi.HttpResponseBody.FromString(file.read())
    return api_pb2.Asgi(http_response_body=rest), path


def _place_of_body(path: Path) -> tuple[int, int] | None:
    """Where in a file with an `Asgi` message the body of an answer lies; None: it is another message."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    try:
        outer, position = _varint(head, 0)
        _, position = _varint(head, position)
        inner, position = _varint(head, position)
        length, position = _varint(head, position)
    except IndexError:
        return None
    if (outer, inner) != (_RESPONSE_BODY, _BODY) or position + length > path.stat().st_size:
        return None
    return position, position + length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if not byte & 0x80:
            return value, position
