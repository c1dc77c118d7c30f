import asyncio

import pytest

from aeolian.domain.errors import NotFound
from aeolian.worker.execs.spool import Spool


def small(tmp_path) -> Spool:
    return Spool(tmp_path, max_unread_bytes=20, kept_bytes=8, segment_bytes=4)


async def everything(spool: Spool, offset: int = 0) -> bytes:
    found = b""
    while data := await spool.read(offset + len(found), 100, 0):
        found += data
    return found


async def test_output_is_read_from_any_byte_that_is_kept(tmp_path):
    spool = Spool(tmp_path, segment_bytes=4)
    spool.write(b"abcdefghij")
    spool.write(b"klm")
    assert await everything(spool) == b"abcdefghijklm"
    assert await everything(spool, 7) == b"hijklm"
    assert await spool.read(2, 1, 0) == b"c"
    spool.close()


async def test_a_reader_hears_at_once_of_what_comes_and_of_the_end(tmp_path):
    spool = Spool(tmp_path)
    reading = asyncio.create_task(spool.read(0, 100, 60))
    await asyncio.sleep(0)
    spool.write(b"now")
    assert await reading == b"now"
    reading = asyncio.create_task(spool.read(3, 100, 60))
    await asyncio.sleep(0)
    spool.finish()
    assert await reading == b""
    assert spool.is_over
    assert await spool.read(0, 100, 0) == b"now", "what came is read after the end, too"
    spool.close()


async def test_unread_output_beyond_the_limit_has_no_room_until_it_is_read(tmp_path):
    spool = small(tmp_path)
    spool.write(b"x" * 20)
    assert not spool.has_room.is_set()
    await spool.read(4, 100, 0)
    assert spool.has_room.is_set()
    spool.close()


async def test_what_was_read_long_ago_goes_and_what_a_broken_connection_needs_stays(tmp_path):
    spool = small(tmp_path)
    offset = 0
    for number in range(100):
        spool.write(b"%04d" % number)
        offset += len(await spool.read(offset, 100, 0))
    assert offset == 400
    assert spool.end - spool.start <= 8 + 3 * 4
    assert await everything(spool, 400 - 8) == b"00980099"
    with pytest.raises(NotFound, match="not kept any more"):
        await spool.read(0, 100, 0)
    spool.close()
