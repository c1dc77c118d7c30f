import asyncio
import itertools

import msgspec
import pytest
from some_environments import ME, STRANGER, ShiftedClock, SomeEnvironments

from aeolian.control import dicts as control
from aeolian.control.dicts import Dicts
from aeolian.domain.caller import Caller
from aeolian.domain.errors import InvalidArgument, NotFound, PayloadTooLarge
from aeolian.storage.database import Database

keys = itertools.count()


def request() -> Caller:
    """A client's request, told apart from all others."""
    return msgspec.structs.replace(ME, idempotency_key=f"key-{next(keys)}")


@pytest.fixture
def dicts(database: Database) -> Dicts:
    return Dicts(database, ShiftedClock(), SomeEnvironments())


@pytest.fixture
async def shelf(dicts: Dicts) -> str:
    return (await dicts.objects.create("shelf", "", ME, if_exists="fail")).object_id


async def put(dicts: Dicts, shelf: str, entries: dict[bytes, bytes], *, if_not_exists: bool = False) -> bool:
    return await dicts.update(shelf, list(entries.items()), request(), if_not_exists=if_not_exists)


async def everything(dicts: Dicts, shelf: str) -> dict[bytes, bytes]:
    return {key: value async for key, value in dicts.contents(shelf, ME, with_values=True)}


async def test_values_are_put_replaced_and_taken_out(dicts, shelf):
    assert await put(dicts, shelf, {b"a": b"1", b"b": b"2"})
    assert await put(dicts, shelf, {b"b": b"3", b"": b""})
    assert await dicts.get(shelf, b"b", ME) == b"3"
    assert await dicts.get(shelf, b"", ME) == b""
    assert await dicts.get(shelf, b"c", ME) is None
    assert [await dicts.has(shelf, key, ME) for key in (b"a", b"", b"c")] == [True, True, False]
    assert await dicts.count(shelf, ME) == 3
    assert await dicts.pop(shelf, b"a", request()) == b"1"
    assert await dicts.pop(shelf, b"a", request()) is None
    await dicts.clear(shelf, ME)
    assert await everything(dicts, shelf) == {}


async def test_of_many_who_put_if_it_is_not_there_one_wins(dicts, shelf):
    answers = await asyncio.gather(*(put(dicts, shelf, {b"k": b"%d" % n}, if_not_exists=True) for n in range(50)))
    assert sum(answers) == 1
    assert await dicts.get(shelf, b"k", ME) == b"%d" % answers.index(True)
    assert await put(dicts, shelf, {b"k": b"x", b"new": b"y"}, if_not_exists=True)
    assert (await dicts.get(shelf, b"k", ME), await dicts.get(shelf, b"new", ME)) == (
        b"%d" % answers.index(True),
        b"y",
    )


async def test_repeated_requests_get_the_same_answer(dicts, shelf):
    first, second = request(), request()
    for _ in range(2):
        assert await dicts.update(shelf, [(b"k", b"1")], first, if_not_exists=True)
    for _ in range(2):
        assert await dicts.pop(shelf, b"k", second) == b"1"
    assert await dicts.count(shelf, ME) == 0


async def test_all_entries_are_listed_also_of_a_large_dict_with_large_values(dicts, shelf, monkeypatch):
    monkeypatch.setattr(control, "PAGE_ENTRIES", 100)
    monkeypatch.setattr(control, "PART_BYTES", 1000)
    entries = {b"key %d" % n: bytes(n % 400) for n in range(1234)}
    await put(dicts, shelf, entries)
    assert await everything(dicts, shelf) == entries
    assert {key async for key, _ in dicts.contents(shelf, ME, with_values=False)} == entries.keys()
    assert await dicts.count(shelf, ME) == 1234


async def test_what_is_too_large_is_refused_and_nothing_changes(dicts, shelf, monkeypatch):
    monkeypatch.setattr(control, "MAX_VALUE_BYTES", 1000)
    with pytest.raises(PayloadTooLarge, match=r"1,001 serialized bytes .*status = '413'"):
        await put(dicts, shelf, {b"ok": b"", b"k": bytes(1001)})
    with pytest.raises(InvalidArgument, match="65,537 serialized bytes is too long"):
        await put(dicts, shelf, {bytes(65_537): b""})
    with pytest.raises(InvalidArgument, match="10,000 entries at a time"):
        await put(dicts, shelf, {b"%d" % n: b"" for n in range(10_001)})
    assert await dicts.count(shelf, ME) == 0


async def test_a_dict_that_is_gone_or_another_s_is_not_there(dicts, shelf):
    async def attempts(caller: Caller, dict_id: str) -> None:
        for attempt in (
            dicts.get(dict_id, b"k", caller),
            dicts.has(dict_id, b"k", caller),
            dicts.update(dict_id, [(b"k", b"v")], caller, if_not_exists=False),
            dicts.pop(dict_id, b"k", caller),
            dicts.count(dict_id, caller),
            dicts.clear(dict_id, caller),
            anext(dicts.contents(dict_id, caller, with_values=True)),
        ):
            with pytest.raises(NotFound, match=dict_id):
                await attempt

    await attempts(STRANGER, shelf)
    await put(dicts, shelf, {b"k": b"v"})
    await dicts.objects.delete(shelf, ME)
    await attempts(ME, shelf)
