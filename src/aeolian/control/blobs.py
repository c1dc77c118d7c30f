"""Blobs: payloads too large for a message, uploaded and fetched by signed URL.

A blob needs no row in the database: its URL says what may be stored under which id, and the store holds it.
Who refers to a blob (a call, an output) owns it, and deletes it or lets `collect` find it unowned.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from aeolian.control.signed_urls import SignedUrls
from aeolian.domain.clock import Clock
from aeolian.domain.errors import InvalidArgument
from aeolian.domain.ids import new_id
from aeolian.storage.blobs import BlobStore

log = logging.getLogger(__name__)

SINGLE_UPLOAD_BYTES = 64 << 20
"""Up to this length a blob is uploaded by one PUT, where the client accepts the host."""
PART_BYTES = 4 << 30
"""The SDK copies the whole of a payload in memory for each part: few parts, or a call of 1 GiB takes many times that."""
MAX_PARTS = 1000
MAX_BLOB_BYTES = 1 << 40
PLACEHOLDER_MD5 = bytes.fromhex("baadbaadbaadbaadbaadbaadbaadbaad")
"""What clients send instead of an MD5 for files over 1 GiB."""

COLLECT_S = 3600.0
UNOWNED_LIFETIME_S = 7 * 24 * 3600.0
"""Blobs that nobody refers to are kept this long: as long as the results of calls."""


class Upload(NamedTuple):
    """Where to upload a blob: one URL, or one a part (all but the last of `part_length` bytes) and one to finish."""

    blob_id: str
    url: str
    part_urls: list[str]
    part_length: int
    completion_url: str


class Blobs:
    def __init__(self, store: BlobStore, urls: SignedUrls):
        self._store = store
        self._urls = urls
        self._collector: asyncio.Task | None = None

    async def open(self, clock: Clock, owned: Callable[[], Awaitable[Collection[str]]]) -> None:
        """Start deleting, once an hour, old blobs that `owned()` (ids that anything refers to) does not name."""
        self._collector = asyncio.create_task(self._collect_forever(clock, owned), name="blobs-collect")

    async def close(self) -> None:
        if self._collector is not None:
            self._collector.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._collector

    async def _collect_forever(self, clock: Clock, owned: Callable[[], Awaitable[Collection[str]]]) -> None:
        while True:
            await asyncio.sleep(COLLECT_S)
            try:
                # The age is looked at first: what is younger may be referred to a moment from now.
                older_than = clock.now() - UNOWNED_LIFETIME_S
                ids = frozenset(await owned())
                if num_deleted := await self.collect(older_than, ids.__contains__):
                    log.info("deleted %d blobs that nobody refers to", num_deleted)
            except Exception:
                log.exception("collecting blobs failed; the next turn tries again")

    def create(self, length: int, md5: bytes, sha256: bytes) -> Upload:
        """An id and URLs for a blob of that content. `md5` and `sha256` may be empty. Nothing is stored yet.

        Raises InvalidArgument, OutOfSpace.
        """
        if not 0 <= length <= MAX_BLOB_BYTES:
            raise InvalidArgument(f"a blob of {length} bytes is not possible: at most {MAX_BLOB_BYTES}")
        if len(md5) not in (0, 16) or len(sha256) not in (0, 32):
            raise InvalidArgument("content_md5 and content_sha256_base64 must be base64 of 16 and of 32 bytes")
        self._store.check_room(length)
        blob_id = new_id("blob")
        path = f"/blobs/{blob_id}"
        md5_hex = "" if md5 == PLACEHOLDER_MD5 else md5.hex()
        if length <= SINGLE_UPLOAD_BYTES and self._urls.is_plain_host:
            url = self._urls.make("PUT", path, length=length, md5=md5_hex, sha256=sha256.hex())
            return Upload(blob_id, url, [], 0, "")
        part_length = max(PART_BYTES, -(-length // MAX_PARTS))
        num_parts = max(1, -(-length // part_length))
        part_urls = [
            self._urls.make(
                "PUT",
                f"{path}/parts/{index}",
                length=min(part_length, length - index * part_length),
                part_length=part_length,
            )
            for index in range(num_parts)
        ]
        completion_url = self._urls.make(
            "POST", f"{path}/complete", length=length, sha256=sha256.hex(), num_parts=num_parts
        )
        return Upload(blob_id, "", part_urls, part_length, completion_url)

    async def download_url(self, blob_id: str) -> str:
        """Raises NotFound."""
        await self._store.local_path(blob_id)
        return self._urls.make("GET", f"/blobs/{blob_id}")

    async def open_path(self, blob_id: str) -> Path:
        """The blob as a local file, not to be written. Raises NotFound."""
        return await self._store.local_path(blob_id)

    async def read(self, blob_id: str) -> bytes:
        """All of it in memory. Raises NotFound."""
        path = await self._store.local_path(blob_id)
        return await asyncio.to_thread(path.read_bytes)

    async def put(self, data: bytes) -> str:
        """Store bytes; return the new blob's id."""
        blob_id = new_id("blob")
        await self._store.put(blob_id, data)
        return blob_id

    async def delete(self, blob_id: str) -> None:
        """Delete it, if it is there."""
        await self._store.delete(blob_id)

    async def collect(self, older_than: float, is_owned: Callable[[str], bool] = lambda blob_id: False) -> int:
        """Delete blobs made before `older_than` (seconds since the epoch) that nobody owns; return how many."""
        return await self._store.collect(older_than, is_owned)

    # ---- what the signed URLs do ------------------------------------------------------------------------

    async def upload(self, url_path: str, query: Mapping[str, str], blob_id: str, chunks: AsyncIterable[bytes]) -> str:
        """PUT of a whole blob; returns its MD5 in hex."""
        allowed = self._urls.check("PUT", url_path, query)
        md5, sha256 = allowed["md5"], allowed["sha256"]
        return await self._store.receive(
            blob_id,
            chunks,
            length=int(allowed["length"]),
            md5=bytes.fromhex(md5) or None,
            sha256=bytes.fromhex(sha256) or None,
        )

    async def upload_part(
        self, url_path: str, query: Mapping[str, str], blob_id: str, index: int, chunks: AsyncIterable[bytes]
    ) -> str:
        """PUT of one part; returns the part's MD5 in hex."""
        allowed = self._urls.check("PUT", url_path, query)
        length, part_length = int(allowed["length"]), int(allowed["part_length"])
        return await self._store.receive_part(blob_id, chunks, index=index, length=length, part_length=part_length)

    async def complete(self, url_path: str, query: Mapping[str, str], blob_id: str, body: str) -> str:
        """POST that ends an upload in parts; returns the ETag of the whole, as S3 makes it."""
        allowed = self._urls.check("POST", url_path, query)
        num_parts = int(allowed["num_parts"])
        if (named := len(re.findall(r"<Part>", body))) != num_parts:
            raise InvalidArgument(f"the completion of {blob_id} names {named} parts, not {num_parts}")
        sha256 = bytes.fromhex(allowed["sha256"]) or None
        return await self._store.complete(blob_id, num_parts=num_parts, length=int(allowed["length"]), sha256=sha256)

    async def download(self, method: str, url_path: str, query: Mapping[str, str], blob_id: str) -> Path:
        """GET or HEAD: the file to send."""
        self._urls.check(method, url_path, query)
        return await self._store.local_path(blob_id)
