"""Dicts: maps of serialized keys to serialized values, shared by all who know them."""

from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial

from sqlalchemy.engine import Connection

from aeolian.control.named_objects import Environments, NamedObjects
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import InvalidArgument, PayloadTooLarge
from aeolian.storage import dicts as storage
from aeolian.storage.database import Database

MAX_ENTRIES_AT_ONCE = 10_000
MAX_VALUE_BYTES = (100 << 20) + 1024
"""100 MiB of a user's, and what serializing adds."""
MAX_KEY_BYTES = 64 << 10
MAX_COUNT = 100_000
PAGE_ENTRIES = 1000
PART_BYTES = 8 << 20
"""About as much of a Dict's values is held in memory while they are sent."""


class Dicts:
    def __init__(self, database: Database, clock: Clock, environments: Environments):
        self._database = database
        self.objects = NamedObjects("dict", database, clock, environments, storage.clear)

    async def get(self, dict_id: str, key: bytes, caller: Caller) -> bytes | None:
        def get(connection: Connection) -> bytes | None:
            self.objects.existing(connection, dict_id, caller)
            return storage.get(connection, dict_id, key)

        return await self._database.read(get)

    async def has(self, dict_id: str, key: bytes, caller: Caller) -> bool:
        def has(connection: Connection) -> bool:
            self.objects.existing(connection, dict_id, caller)
            return storage.has(connection, dict_id, key)

        return await self._database.read(has)

    async def update(
        self, dict_id: str, entries: Sequence[tuple[bytes, bytes]], caller: Caller, *, if_not_exists: bool
    ) -> bool:
        """Put all entries, or (with `if_not_exists`) only those whose key is new. Whether any was put."""
        check_entries(entries)

        def update(connection: Connection) -> bool:
            self.objects.existing(connection, dict_id, caller)
            wanted = entries
            if if_not_exists:
                wanted = [(key, value) for key, value in entries if not storage.has(connection, dict_id, key)]
            storage.put(connection, dict_id, wanted)
            return bool(wanted)

        return await self._database.write(update, once=caller.once("DictUpdate") if if_not_exists else None)

    async def pop(self, dict_id: str, key: bytes, caller: Caller) -> bytes | None:
        """Take an entry out. The same request, repeated, gets the same value."""

        def pop(connection: Connection) -> bytes | None:
            self.objects.existing(connection, dict_id, caller)
            return storage.pop(connection, dict_id, key)

        return await self._database.write(pop, once=caller.once("DictPop"))

    async def count(self, dict_id: str, caller: Caller) -> int:
        """How many entries there are, at most 100,000."""

        def count(connection: Connection) -> int:
            self.objects.existing(connection, dict_id, caller)
            return storage.count(connection, dict_id, MAX_COUNT)

        return await self._database.read(count)

    async def contents(self, dict_id: str, caller: Caller, *, with_values: bool) -> AsyncIterator[tuple[bytes, bytes]]:
        """All entries, in no particular order, part by part: what changes meanwhile may or may not be seen."""
        await self.objects.get(dict_id, caller)
        after = b""
        while True:
            page = await self._database.read(
                partial(storage.page_of_keys, dict_id=dict_id, after=after, limit=PAGE_ENTRIES)
            )
            if not with_values:
                for _, key, _ in page:
                    yield key, b""
            else:
                for first, last in _parts(page):
                    read = partial(storage.range_of_entries, dict_id=dict_id, first=first, last=last)
                    for key, value in await self._database.read(read):
                        yield key, value
            if len(page) < PAGE_ENTRIES:
                return
            after = page[-1][0]

    async def clear(self, dict_id: str, caller: Caller) -> None:
        def clear(connection: Connection) -> None:
            self.objects.existing(connection, dict_id, caller)
            storage.clear(connection, dict_id)

        await self._database.write(clear)


def _parts(page: Sequence[tuple[bytes, bytes, int]]) -> Iterator[tuple[bytes, bytes]]:
    """Cut a page (digest, key, size) into ranges of digests with so much in them."""
    first, size = b"", 0
    for digest, _, value_bytes in page:
        first = first or digest
        size += value_bytes
        if size >= PART_BYTES:
            yield first, digest
            first, size = b"", 0
    if first:
        yield first, page[-1][0]


def check_entries(entries: Sequence[tuple[bytes, bytes]]) -> None:
    if len(entries) > MAX_ENTRIES_AT_ONCE:
        raise InvalidArgument(f"up to {MAX_ENTRIES_AT_ONCE:,} entries at a time, not {len(entries):,}")
    for key, value in entries:
        if len(key) > MAX_KEY_BYTES:
            raise InvalidArgument(f"a key of {len(key):,} serialized bytes is too long: {MAX_KEY_BYTES:,} is the limit")
        if len(value) > MAX_VALUE_BYTES:
            raise PayloadTooLarge(
                f"a value of {len(value):,} serialized bytes is too large: {MAX_VALUE_BYTES:,} is the limit; "
                "put large data into a Volume (status = '413')"
            )
