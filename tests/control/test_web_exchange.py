import asyncio

import pytest
from modal_proto import api_pb2

from aeolian.control import web_exchange
from aeolian.control.web_exchange import Exchange
from aeolian.domain.calls import Status
from aeolian.domain.errors import FailedPrecondition


def body(data: bytes, *, more: bool = True) -> api_pb2.Asgi:
    return api_pb2.Asgi(http_request=api_pb2.Asgi.HttpRequest(body=data, more_body=more))


GONE = api_pb2.Asgi(http_disconnect=api_pb2.Asgi.HttpDisconnect())


def chunk(index: int, data: bytes = b"x") -> api_pb2.DataChunk:
    return api_pb2.DataChunk(data_format=api_pb2.DATA_FORMAT_ASGI, data=data, index=index)


async def read(exchange: Exchange, count: int, after: int = 0) -> list[bytes]:
    """As a container reads: the bodies of the next messages."""
    found = []
    async for _, data in exchange.follow(after):
        message = api_pb2.Asgi.FromString(api_pb2.DataChunk.FromString(data).data)
        found.append(message.http_request.body if message.HasField("http_request") else b"<gone>")
        if len(found) == count:
            break
    return found


async def test_messages_come_in_their_order_and_can_be_read_again():
    exchange = Exchange()
    await exchange.tell(body(b"one"))
    await exchange.tell(body(b"two"))
    assert await read(exchange, 2) == [b"one", b"two"]
    exchange.leave(GONE)
    assert await read(exchange, 1, after=2) == [b"<gone>"]
    assert await read(exchange, 3) == [b"one", b"two", b"<gone>"]


async def test_a_body_waits_for_a_container_that_reads_slowly():
    exchange = Exchange()
    sending = asyncio.create_task(tell_much(exchange, 64))
    await asyncio.sleep(0)
    held = exchange._ahead_bytes
    assert not sending.done() and held <= web_exchange.MAX_AHEAD_BYTES + (128 << 10)
    assert sum(map(len, await read(exchange, 64))) == 64 * (64 << 10)
    await sending


async def tell_much(exchange: Exchange, count: int) -> None:
    for number in range(count):
        await exchange.tell(body(bytes(64 << 10), more=number < count - 1))


async def test_an_answer_waits_for_a_client_that_reads_slowly():
    exchange = Exchange()

    async def send() -> None:
        for index in range(1, 33):
            await exchange.put([chunk(index, bytes(256 << 10))])
        exchange.end(Status.SUCCESS)

    sending = asyncio.create_task(send())
    await asyncio.sleep(0)
    assert not sending.done() and exchange._waiting_bytes <= web_exchange.MAX_WAITING_BYTES + (256 << 10)
    assert [len(part.data) async for part in exchange.answers()] == [256 << 10] * 32
    await sending


async def test_repeated_chunks_are_passed_over():
    exchange = Exchange()
    await exchange.put([chunk(1, b"a"), chunk(2, b"b")])
    await exchange.put([chunk(2, b"b"), chunk(3, b"c")])
    exchange.end(Status.SUCCESS)
    assert [part.data async for part in exchange.answers()] == [b"a", b"b", b"c"]


async def test_an_app_that_talks_to_nobody_is_not_kept_waiting():
    exchange = Exchange()
    exchange.leave(GONE)
    for index in range(1, 20):
        await exchange.put([chunk(index, bytes(1 << 20))])
    assert exchange._waiting_bytes == 0


async def test_another_container_begins_again_while_nothing_was_answered():
    exchange = Exchange()
    await exchange.tell(body(b"all of it", more=False))
    assert await read(exchange, 1) == [b"all of it"]
    await exchange.put([chunk(1, b"half an answer")])
    assert exchange.begin_again()
    assert await read(exchange, 1) == [b"all of it"]
    await exchange.put([chunk(1, b"an answer")])
    exchange.end(Status.SUCCESS)
    assert [part.data async for part in exchange.answers()] == [b"an answer"]


@pytest.mark.parametrize("what", ["answered", "deserted", "read"])
async def test_no_other_container_begins_when_something_cannot_be_taken_back(what):
    exchange = Exchange()
    match what:
        case "answered":
            await exchange.put([chunk(1)])
            await anext(exchange.answers())
        case "deserted":
            exchange.leave(GONE)
        case "read":  # more of the body than is kept
            sending = asyncio.create_task(tell_much(exchange, 16))
            await read(exchange, 16)
            await sending
            with pytest.raises(FailedPrecondition, match="is gone"):
                await read(exchange, 1)
    assert not exchange.begin_again()


async def test_whoever_waits_hears_of_the_end():
    exchange = Exchange()
    reading = asyncio.create_task(read(exchange, 1))
    await asyncio.sleep(0)
    exchange.end(Status.TIMEOUT)
    assert await reading == []
    assert [part async for part in exchange.answers()] == []
    assert exchange.status is Status.TIMEOUT and exchange.is_over
