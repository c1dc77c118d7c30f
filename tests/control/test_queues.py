import asyncio
import itertools
from collections.abc import AsyncIterator, Coroutine

import msgspec
import pytest
from some_environments import ME, STRANGER, ShiftedClock, SomeEnvironments

from aeolian.control.queue_partitions import MAX_BYTES, MAX_ITEMS
from aeolian.control.queues import MAX_ITEM_BYTES, Queues
from aeolian.domain.caller import Caller
from aeolian.domain.errors import InvalidArgument, NotFound, PayloadTooLarge, ResourceExhausted
from aeolian.storage.database import Database

keys = itertools.count()


def request(**fields) -> Caller:
    """A client's request, told apart from all others."""
    return msgspec.structs.replace(ME, idempotency_key=f"key-{next(keys)}", **fields)


@pytest.fixture
def clock() -> ShiftedClock:
    return ShiftedClock()


@pytest.fixture
async def queues(database: Database, clock: ShiftedClock) -> AsyncIterator[Queues]:
    queues = Queues(database, clock, SomeEnvironments())
    await queues.open()
    yield queues
    await queues.close()


@pytest.fixture
async def queue(queues: Queues) -> str:
    return (await queues.objects.create("jobs", "", ME, if_exists="fail")).object_id


async def waiting(queues: Queues, work: Coroutine) -> asyncio.Task:
    """A request that has come to where it waits."""

    def num_waiting() -> int:
        partitions = [partition for some in queues._partitions.values() for partition in some.values()]
        return sum(len(p._takers) + len(p._lookers) + len(p._putters) for p in partitions)

    before = num_waiting()
    task = asyncio.create_task(work)
    while num_waiting() == before and not task.done():  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    return task


async def take_all(queues: Queues, queue: str, key: bytes = b"") -> list[bytes]:
    return await queues.take(queue, key, MAX_ITEMS, request())


async def test_items_come_out_in_the_order_of_their_coming(queues, queue):
    await queues.put(queue, b"", [b"1", b"2"], request())
    await queues.put(queue, b"", [b"3"], request())
    assert await queues.count(queue, b"", ME, total=False) == 3
    assert await queues.take(queue, b"", 2, request()) == [b"1", b"2"]
    assert await queues.take(queue, b"", 2, request()) == [b"3"]
    assert await queues.take(queue, b"", 2, request()) == []


async def test_partitions_are_independent(queues, queue):
    await queues.put(queue, b"a", [b"1"], request())
    await queues.put(queue, b"b", [b"2", b"3"], request())
    assert await queues.count(queue, b"", ME, total=False) == 0
    assert await queues.count(queue, b"", ME, total=True) == 3
    assert queues.summary(await queues.objects.get(queue, ME)) == (2, 3)
    assert await take_all(queues, queue, b"b") == [b"2", b"3"]
    await queues.clear(queue, b"b", ME, all_partitions=False)
    assert await take_all(queues, queue, b"a") == [b"1"]


async def test_a_take_that_waits_is_woken_by_a_put(queues, queue):
    first = await waiting(queues, queues.take(queue, b"", 10, request(), wait_s=30))
    second = await waiting(queues, queues.take(queue, b"", 10, request(), wait_s=30))
    await queues.put(queue, b"", [b"1"], request())
    assert await first == [b"1"]
    assert not second.done()
    await queues.put(queue, b"", [b"2"], request())
    assert await second == [b"2"]


async def test_a_take_that_waits_in_vain_gets_nothing(queues, queue):
    assert await queues.take(queue, b"", 1, request(), wait_s=0.05) == []
    assert queues._partitions == {}


async def test_a_taker_that_went_away_takes_nothing(queues, queue):
    gone = await waiting(queues, queues.take(queue, b"", 10, request(), wait_s=30))
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    await queues.put(queue, b"", [b"1"], request())
    assert await take_all(queues, queue) == [b"1"]


async def test_the_wake_up_of_a_taker_that_went_away_is_the_next_one_s(queues, queue):
    gone = await waiting(queues, queues.take(queue, b"", 1, request(), wait_s=30))
    next_one = await waiting(queues, queues.take(queue, b"", 1, request(), wait_s=30))
    put = asyncio.create_task(queues.put(queue, b"", [b"1"], request()))
    partition = queues._partitions[queue][b""]
    while not partition.num_arrivals:  # noqa: ASYNC110
        await asyncio.sleep(0)
    gone.cancel()  # woken, but it has not run since
    await put
    assert await next_one == [b"1"]


async def test_a_taker_that_goes_away_in_the_middle_leaves_the_count_right(queues, queue):
    caller = request()
    await queues.put(queue, b"", [b"1", b"2"], request())
    gone = asyncio.create_task(queues.take(queue, b"", 1, caller))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    again = await queues.take(queue, b"", 1, caller)
    assert await take_all(queues, queue) == ([b"2"] if again == [b"1"] else [b"1"])
    assert await queues.count(queue, b"", ME, total=False) == 0


async def test_a_repeated_take_gets_the_same_items(queues, queue):
    caller = request()
    await queues.put(queue, b"", [b"1", b"2"], request())
    assert await queues.take(queue, b"", 1, caller) == [b"1"]
    assert await queues.take(queue, b"", 1, caller) == [b"1"]
    assert await take_all(queues, queue) == [b"2"]
    assert await queues.take(queue, b"", 1, caller) == [b"1"]  # and does not wait for others


async def test_a_repeated_put_puts_once(queues, queue):
    caller = request()
    await asyncio.gather(*(queues.put(queue, b"", [b"1", b"2"], caller) for _ in range(3)))
    assert await queues.count(queue, b"", ME, total=False) == 2
    assert await take_all(queues, queue) == [b"1", b"2"]
    await queues.put(queue, b"", [b"1", b"2"], caller)
    assert await take_all(queues, queue) == []


async def test_many_consumers_get_each_item_once(queues, queue):
    async def consume() -> list[bytes]:
        mine: list[bytes] = []
        while b"end" not in mine:
            mine += await queues.take(queue, b"", 3, request(), wait_s=30)
        if mine.count(b"end") > 1:
            await queues.put(queue, b"", [b"end"] * (mine.count(b"end") - 1), request())
        return [value for value in mine if value != b"end"]

    consumers = [asyncio.create_task(consume()) for _ in range(8)]
    await asyncio.gather(*(queues.put(queue, b"", [b"%d.%d" % (n, m) for m in range(7)], request()) for n in range(50)))
    await queues.put(queue, b"", [b"end"] * len(consumers), request())
    taken = [value for part in await asyncio.gather(*consumers) for value in part]
    assert sorted(taken) == sorted(b"%d.%d" % (n, m) for n in range(50) for m in range(7))
    assert await queues.count(queue, b"", ME, total=True) == 0


async def test_items_outlive_the_server_and_a_repeated_request_too(queues, queue, database, clock):
    caller = request()
    await queues.put(queue, b"p", [b"1", b"2", b"3"], request())
    assert await queues.take(queue, b"p", 1, caller) == [b"1"]
    [(seq, _), *_] = await queues.after(queue, b"p", 0, ME, wait_s=0)
    again = Queues(database, clock, SomeEnvironments())
    await again.open()
    try:
        assert await again.count(queue, b"p", ME, total=True) == 2
        assert await again.take(queue, b"p", 1, caller) == [b"1"]
        assert await again.count(queue, b"p", ME, total=True) == 2
        assert await take_all(again, queue, b"p") == [b"2", b"3"]
        await again.put(queue, b"p", [b"4"], request())
        [(next_seq, value)] = await again.after(queue, b"p", seq, ME, wait_s=0)
        assert (value, next_seq > seq) == (b"4", True)
    finally:
        await again.close()


async def test_a_full_partition_refuses_and_others_do_not(queues, queue):
    await queues.put(queue, b"", [b"x"] * MAX_ITEMS, request())
    with pytest.raises(ResourceExhausted, match="the queue is full: this partition has 5,000 items"):
        await queues.put(queue, b"", [b"y"], request())
    await queues.put(queue, b"other", [b"y"], request())
    await queues.take(queue, b"", 1, request())
    await queues.put(queue, b"", [b"y"], request())


async def test_a_partition_is_full_by_its_bytes_too(queues, queue):
    big = bytes(1 << 20)
    for _ in range(MAX_BYTES // len(big) // 16):
        await queues.put(queue, b"", [big] * 16, request())
    with pytest.raises(ResourceExhausted, match="the queue is full"):
        await queues.put(queue, b"", [b"y"], request())
    await queues.take(queue, b"", 1, request())
    await queues.put(queue, b"", [b"y"], request())


async def test_what_can_never_fit_is_refused(queues, queue):
    with pytest.raises(ResourceExhausted, match="put fewer at a time"):
        await queues.put(queue, b"", [b"x"] * (MAX_ITEMS + 1), request())
    with pytest.raises(PayloadTooLarge, match="413"):
        await queues.put(queue, b"", [bytes(MAX_ITEM_BYTES + 1)], request())
    with pytest.raises(InvalidArgument, match="64 bytes"):
        await queues.put(queue, b"k" * 65, [b"x"], request())
    with pytest.raises(InvalidArgument, match="7 days"):
        await queues.put(queue, b"", [b"x"], request(), ttl_s=8 * 86400)


async def test_a_put_that_is_repeated_waits_for_room(queues, queue):
    await queues.put(queue, b"", [b"x"] * MAX_ITEMS, request())
    caller = request()
    with pytest.raises(ResourceExhausted):
        await queues.put(queue, b"", [b"late"], caller)
    put = await waiting(queues, queues.put(queue, b"", [b"late"], caller))
    await queues.take(queue, b"", 1, request())
    await put
    taken = [await queues.take(queue, b"", 1000, request()) for _ in range(5)]
    assert taken[-1][-1] == b"late"


async def test_a_put_that_waits_is_answered_before_its_client_gives_up(queues, queue):
    await queues.put(queue, b"", [b"x"] * MAX_ITEMS, request())
    caller = request(time_left_s=0.6)
    for _ in range(2):
        with pytest.raises(ResourceExhausted):
            await queues.put(queue, b"", [b"late"], caller)


async def test_a_put_whose_client_goes_away_while_it_waits_puts_nothing(queues, queue):
    await queues.put(queue, b"", [b"x"] * MAX_ITEMS, request())
    caller = request()
    with pytest.raises(ResourceExhausted):
        await queues.put(queue, b"", [b"late"], caller)
    put = await waiting(queues, queues.put(queue, b"", [b"late"], caller))
    put.cancel()
    await asyncio.gather(put, return_exceptions=True)
    await queues.clear(queue, b"", ME, all_partitions=False)
    assert await take_all(queues, queue) == []


async def test_looking_takes_nothing_and_waits_for_more(queues, queue):
    await queues.put(queue, b"", [b"1", b"2"], request())
    items = await queues.after(queue, b"", 0, ME, wait_s=0)
    assert [value for _, value in items] == [b"1", b"2"]
    more = await waiting(queues, queues.after(queue, b"", items[-1][0], ME, wait_s=30))
    await queues.put(queue, b"", [b"3"], request())
    assert [value for _, value in await more] == [b"3"]
    assert await queues.after(queue, b"", (await more)[-1][0], ME, wait_s=0.01) == []
    assert await queues.count(queue, b"", ME, total=False) == 3


async def test_a_partition_is_cleared_when_its_time_is_over(queues, queue, clock):
    await queues.put(queue, b"short", [b"1"], request(), ttl_s=10)
    await queues.put(queue, b"long", [b"2"], request())
    clock.advance(9)
    assert await queues.count(queue, b"", ME, total=True) == 2
    clock.advance(2)
    assert await queues.count(queue, b"", ME, total=True) == 1
    assert await take_all(queues, queue, b"short") == []
    await queues.put(queue, b"short", [b"3"], request())  # each put starts the time again
    clock.advance(11)
    assert await take_all(queues, queue, b"short") == [b"3"]
    clock.advance(24 * 3600)
    await queues.sweep()
    assert await queues.count(queue, b"", ME, total=True) == 0
    assert queues._partitions == {}


async def test_the_time_of_a_partition_outlives_the_server(queues, queue, database, clock):
    await queues.put(queue, b"", [b"1"], request(), ttl_s=10)
    again = Queues(database, clock, SomeEnvironments())
    await again.open()
    try:
        clock.advance(11)
        await again.sweep()
        assert await take_all(again, queue) == []
    finally:
        await again.close()


async def test_clearing_keeps_what_is_on_its_way_in(queues, queue):
    await queues.put(queue, b"", [b"1"], request())
    await asyncio.gather(
        queues.clear(queue, b"", ME, all_partitions=True),
        *(queues.put(queue, b"", [b"2"], request()) for _ in range(20)),
    )
    left = await queues.count(queue, b"", ME, total=False)
    assert len(await take_all(queues, queue)) == left
    with pytest.raises(InvalidArgument, match="either one partition or all"):
        await queues.clear(queue, b"x", ME, all_partitions=True)


async def test_a_deleted_queue_is_gone_for_those_who_wait_too(queues, queue):
    taker = await waiting(queues, queues.take(queue, b"", 1, request(), wait_s=30))
    looker = await waiting(queues, queues.after(queue, b"", 0, ME, wait_s=30))
    await queues.objects.delete(queue, ME)
    for request_of_old in (taker, looker):
        with pytest.raises(NotFound, match=queue):
            await request_of_old
    for attempt in (
        queues.put(queue, b"", [b"1"], request()),
        queues.put(queue, b"", [], request()),
        queues.take(queue, b"", 1, request()),
        queues.count(queue, b"", ME, total=True),
        queues.clear(queue, b"", ME, all_partitions=True),
    ):
        with pytest.raises(NotFound, match=queue):
            await attempt
    assert queues._partitions == {}


async def test_a_queue_of_another_workspace_is_not_there(queues, queue):
    for attempt in (
        queues.put(queue, b"", [b"1"], STRANGER),
        queues.take(queue, b"", 1, STRANGER),
        queues.count(queue, b"", STRANGER, total=False),
        queues.after(queue, b"", 0, STRANGER, wait_s=0),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert await queues.count(queue, b"", ME, total=True) == 0


async def test_an_ephemeral_queue_goes_with_its_items_when_nobody_beats(queues, clock):
    queue = (await queues.objects.create_anonymous("", ME)).object_id
    await queues.put(queue, b"", [b"1"], request())
    clock.advance(600)
    await queues.objects.heartbeat(queue, ME)
    clock.advance(600)
    await queues.objects.sweep()
    assert await queues.count(queue, b"", ME, total=True) == 1
    clock.advance(600)
    await queues.objects.sweep()
    with pytest.raises(NotFound):
        await queues.put(queue, b"", [b"2"], request())
    with pytest.raises(NotFound):
        await queues.objects.heartbeat(queue, ME)


async def test_the_number_of_partitions_is_limited(queues, queue, monkeypatch):
    monkeypatch.setattr("aeolian.control.queues.MAX_PARTITIONS", 2)
    for key in (b"1", b"2"):
        await queues.put(queue, key, [b"x"], request())
    with pytest.raises(ResourceExhausted, match="2 partitions already"):
        await queues.put(queue, b"3", [b"x"], request())
    await queues.take(queue, b"1", 1, request())
    await queues.put(queue, b"3", [b"x"], request())
