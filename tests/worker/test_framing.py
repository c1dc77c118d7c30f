import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aeolian.domain.link import Heartbeat, LogLine, Logs, decode_events
from aeolian.worker import framing
from aeolian.worker.framing import HEADER, FrameLink


class Pair:
    """Two ends of a connection, and the frames that came to each."""

    def __init__(self):
        self.frames: list[bytes] = []
        self.came = asyncio.Event()
        self.lost = asyncio.Event()
        self.one: FrameLink
        self.other: FrameLink

    async def connect(self, path: str) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        accepted: asyncio.Future[FrameLink] = loop.create_future()

        def accept() -> FrameLink:
            link = FrameLink(self._frame, self.lost.set)
            accepted.set_result(link)
            return link

        server = await loop.create_unix_server(accept, path)
        _, self.one = await loop.create_unix_connection(lambda: FrameLink(lambda _: None, lambda: None), path)
        self.other = await accepted
        return server

    def _frame(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.came.set()

    async def messages(self, count: int) -> list:
        async with asyncio.timeout(5):
            while len(found := [event for frame in self.frames for event in decode_events(frame)]) < count:
                self.came.clear()
                await self.came.wait()
        return found


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    pair = Pair()
    server = await pair.connect(str(folder / "link.sock"))
    yield pair
    pair.one.close()
    server.close()
    shutil.rmtree(folder)


async def test_messages_of_one_moment_share_a_frame_and_keep_their_order(pair):
    for number in range(100):
        pair.one.send(Heartbeat(float(number)))
    assert [event.at for event in await pair.messages(100)] == [float(number) for number in range(100)]
    assert len(pair.frames) == 1


async def test_more_than_a_frame_should_hold_is_sent_as_several(pair, monkeypatch):
    monkeypatch.setattr(framing, "SPLIT_BYTES", 10_000)
    for number in range(20):
        pair.one.send(Logs(number, "ta-1", "", (LogLine(1, 0.0, "x" * 3000),)))
    pair.one.send(Logs(20, "ta-1", "", (LogLine(1, 0.0, "y" * 30_000),)))
    assert [event.seq for event in await pair.messages(21)] == list(range(21))
    assert len(pair.frames) > 5


async def test_a_frame_that_cannot_be_ends_the_connection(pair):
    pair.one._transport.write(HEADER.pack(framing.MAX_FRAME_BYTES + 1))
    await asyncio.wait_for(pair.lost.wait(), 5)


async def test_what_is_sent_just_before_closing_arrives(pair):
    pair.one.send(Heartbeat(1.0))
    pair.one.close()
    assert len(await pair.messages(1)) == 1
    await asyncio.wait_for(pair.lost.wait(), 5)
    pair.one.send(Heartbeat(2.0))  # dropped: nobody is there
