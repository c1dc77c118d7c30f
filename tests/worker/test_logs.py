import asyncio

import pytest

from aeolian.domain.link import Logs
from aeolian.worker import logs
from aeolian.worker.logs import LogPump, LogSender


class Recorder:
    """What a pump hands on, and the two streams that it reads."""

    def __init__(self) -> None:
        self.sent: list[Logs] = []
        self.changed = asyncio.Event()
        self.sender = LogSender(self._take)
        self.input = ("", "")
        self.pump = LogPump(self.sender, "ta-1", lambda: self.input)
        self.out, self.err = asyncio.StreamReader(), asyncio.StreamReader()
        self.running = asyncio.create_task(self.pump.run(self.out, self.err))

    def _take(self, batch: Logs) -> None:
        self.sent.append(batch)
        self.changed.set()

    @property
    def lines(self) -> list[tuple[int, str]]:
        return [(line.fd, line.data) for batch in self.sent for line in batch.lines]

    async def end(self) -> list[tuple[int, str]]:
        self.out.feed_eof()
        self.err.feed_eof()
        await self.running
        return self.lines

    async def until(self, condition) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
async def recorder():
    recorder = Recorder()
    yield recorder
    recorder.running.cancel()


async def test_a_line_that_comes_in_parts_is_one_line(recorder):
    for part in (b"one li", b"ne\ntwo", b" lines\nthree"):
        recorder.out.feed_data(part)
        await asyncio.sleep(0)
    recorder.err.feed_data(b"an error\n")
    lines = await recorder.end()
    assert [data for fd, data in lines if fd == 1] == ["one line\n", "two lines\n", "three"]
    assert (2, "an error\n") in lines


async def test_characters_are_whole_wherever_the_reads_cut_them(recorder):
    text = "☃ é 漢字 🎉\n"
    for byte in text.encode():
        recorder.out.feed_data(bytes([byte]))
        await asyncio.sleep(0)
    recorder.out.feed_data(b"\xff bad\n\xe2\x98")
    assert await recorder.end() == [(1, text), (1, "\ufffd bad\n"), (1, "\ufffd")]


async def test_newlines_end_lines_and_nothing_else_that_unicode_calls_so(recorder):
    recorder.out.feed_data("a\x0bc\u2028d\x85e\n\n\nf\r\n".encode())
    assert await recorder.end() == [(1, "a\x0bc\u2028d\x85e\n"), (1, "\n"), (1, "\n"), (1, "f\r\n")]


async def test_each_state_of_a_progress_bar_is_a_line(recorder):
    for state in (b"\r 1%", b"\r 2%", b"\r 3%\r", b"\ndone\r", b"\n"):
        recorder.err.feed_data(state)
        await asyncio.sleep(0)
    assert await recorder.end() == [(2, "\r"), (2, " 1%\r"), (2, " 2%\r"), (2, " 3%\r\n"), (2, "done\r\n")]


async def test_a_prompt_without_an_end_is_shown_after_a_moment(recorder, monkeypatch):
    monkeypatch.setattr(logs, "LINE_WAIT_S", 0.0)
    recorder.out.feed_data(b"password: ")
    await recorder.until(lambda: recorder.lines)
    recorder.out.feed_data(b"thanks\n")
    assert await recorder.end() == [(1, "password: "), (1, "thanks\n")]


async def test_an_endless_line_is_cut(recorder, monkeypatch):
    monkeypatch.setattr(logs, "MAX_LINE_BYTES", 100)
    recorder.out.feed_data(b"x" * 250)
    await asyncio.sleep(0)
    recorder.out.feed_data(b"y\n")
    lines = await recorder.end()
    assert "".join(data for _, data in lines) == "x" * 250 + "y\n" and len(lines) > 1


async def test_lines_belong_to_the_input_that_began_them(recorder):
    recorder.input = ("in-1", "fc-1")
    recorder.out.feed_data(b"of the first\nbegun by the first")
    await asyncio.sleep(0.01)
    recorder.input = ("in-2", "fc-2")
    recorder.out.feed_data(b", ended by the second\nof the second\n")
    await recorder.end()
    owners = [line.input_id for batch in recorder.sent for line in batch.lines]
    assert owners == ["in-1", "in-1", "in-2"]


async def test_output_is_not_read_while_too_much_is_not_stored(recorder, monkeypatch):
    monkeypatch.setattr(logs, "MAX_UNACKED_BYTES", 1000)
    monkeypatch.setattr(logs, "MAX_BATCH_BYTES", 500)
    for _ in range(50):
        recorder.out.feed_data(b"x" * 99 + b"\n")
        await asyncio.sleep(0)
    await recorder.until(lambda: not recorder.sender.has_room)
    before = len(recorder.lines)
    assert before < 50
    await asyncio.sleep(0.02)
    assert len(recorder.lines) == before
    acknowledged = 0
    recorder.out.feed_eof()
    recorder.err.feed_eof()
    while not recorder.running.done():
        for batch in recorder.sent[acknowledged:]:
            recorder.sender.acknowledged(batch.seq)
        acknowledged = len(recorder.sent)
        await asyncio.sleep(0.001)
    assert len(recorder.lines) == 50


async def test_the_last_lines_are_kept_for_an_error_message(recorder):
    recorder.out.feed_data(b"".join(b"line %d\n" % n for n in range(100)) + b"\n" + b"x" * 1000)
    await recorder.end()
    assert recorder.pump.last_lines[:2] == ("line 81", "line 82")
    assert recorder.pump.last_lines[-1] == "x" * 300 + "…"
    assert len(recorder.pump.last_lines) == 20
