"""Bytes from the network to a file, hashed on the way, never held in memory as a whole."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterable
from pathlib import Path

import msgspec

from aeolian.domain.errors import AeolianError, InvalidArgument, OutOfSpace, PayloadTooLarge

PIECE_BYTES = 512 << 10
DISK_FULL = "the server's disk is full: free space in its data directory, then try again"


class Digests(msgspec.Struct, frozen=True):
    """What came. A digest that was not wanted is empty."""

    num_bytes: int
    md5: bytes
    sha256: bytes


async def receive(
    descriptor: int,
    chunks: AsyncIterable[bytes],
    *,
    offset: int,
    max_bytes: int,
    wants_md5: bool = True,
    wants_sha256: bool = True,
) -> Digests:
    """Write `chunks` at `offset` of an open file; return what came. Each digest costs as much as the writing.

    Raises PayloadTooLarge when more than `max_bytes` come, OutOfSpace when the disk is full.
    """
    writer = _Writer(descriptor, offset, wants_md5, wants_sha256)
    pieces: list[bytes] = []
    num_waiting = num_received = 0
    async for chunk in chunks:
        num_received += len(chunk)
        if num_received > max_bytes:
            raise PayloadTooLarge(f"more than the announced {max_bytes} bytes came: announce the true size")
        pieces.append(chunk)
        num_waiting += len(chunk)
        if num_waiting >= PIECE_BYTES:
            await asyncio.to_thread(writer.write, pieces)
            pieces, num_waiting = [], 0
    if num_waiting > 64 << 10:
        await asyncio.to_thread(writer.write, pieces)
    elif pieces:
        writer.write(pieces)
    return Digests(
        num_received,
        writer.md5.digest() if writer.md5 else b"",
        writer.sha256.digest() if writer.sha256 else b"",
    )


def disk_error(error: OSError) -> AeolianError | OSError:
    """`OutOfSpace` for a full disk or quota, else the error itself."""
    return OutOfSpace(DISK_FULL) if error.errno in (28, 122) else error


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises OutOfSpace when so many bytes do not fit on the folder's disk.

    Clients repeat an upload that breaks off for minutes: what cannot be stored is better refused before.
    """
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if num_bytes > free:
        raise OutOfSpace(
            f"the server's disk is full: {num_bytes:,} bytes are to be stored, and {free:,} are free in its data "
            "directory; free space, then try again"
        )


def check_length(num_bytes: int, expected: int) -> None:
    if num_bytes != expected:
        raise InvalidArgument(f"{num_bytes} bytes came, but {expected} were announced: send it again")


class _Writer:
    def __init__(self, descriptor: int, offset: int, wants_md5: bool, wants_sha256: bool):
        self._descriptor, self._offset = descriptor, offset
        self.md5 = hashlib.md5(usedforsecurity=False) if wants_md5 else None
        self.sha256 = hashlib.sha256() if wants_sha256 else None

    def write(self, pieces: list[bytes]) -> None:
        data = memoryview(b"".join(pieces))
        for digest in (self.md5, self.sha256):
            if digest is not None:
                digest.update(data)
        try:
            while data:
                written = os.pwrite(self._descriptor, data, self._offset)
                self._offset += written
                data = data[written:]
        except OSError as error:
            raise disk_error(error) from error
