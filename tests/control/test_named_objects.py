from collections.abc import AsyncIterator

import pytest
from some_environments import ME, STRANGER, ShiftedClock, SomeEnvironments

from aeolian.control.dicts import Dicts
from aeolian.control.named_objects import NamedObjects
from aeolian.domain.errors import AlreadyExists, InvalidArgument, NotFound
from aeolian.storage.database import Database


@pytest.fixture
def clock() -> ShiftedClock:
    return ShiftedClock()


@pytest.fixture
async def dicts(database: Database, clock: ShiftedClock) -> AsyncIterator[Dicts]:
    dicts = Dicts(database, clock, SomeEnvironments())
    await dicts.objects.open()
    yield dicts
    await dicts.objects.close()


@pytest.fixture
def objects(dicts: Dicts) -> NamedObjects:
    return dicts.objects


async def test_a_name_is_made_once_returned_refused_or_replaced(dicts, objects):
    first = await objects.create("x", "", ME, if_exists="fail")
    await dicts.update(first.object_id, [(b"k", b"v")], ME, if_not_exists=False)
    assert (await objects.create("x", "", ME, if_exists="return")).object_id == first.object_id
    with pytest.raises(AlreadyExists, match="a Dict named 'x' already exists in environment 'main'"):
        await objects.create("x", "", ME, if_exists="fail")
    assert await dicts.count(first.object_id, ME) == 1
    assert (await objects.create("x", "", ME, if_exists="replace")).object_id == first.object_id
    assert await dicts.count(first.object_id, ME) == 0
    assert (await objects.lookup("x", "", ME)).object_id == first.object_id


async def test_one_name_in_two_environments_names_two_objects(objects):
    one = await objects.create("x", "", ME, if_exists="fail")
    two = await objects.create("x", "dev", ME, if_exists="fail")
    assert one.object_id != two.object_id
    assert (await objects.lookup("x", "dev", ME)).object_id == two.object_id
    await objects.delete(two.object_id, ME)
    with pytest.raises(NotFound, match="Dict 'x' not found in environment 'dev'"):
        await objects.lookup("x", "dev", ME)
    await objects.lookup("x", "", ME)


async def test_an_environment_that_goes_takes_all_that_is_in_it(dicts, objects):
    kept = await objects.create("x", "", ME, if_exists="fail")
    gone = [await objects.create("x", "dev", ME, if_exists="fail"), await objects.create_anonymous("dev", ME)]
    for item in (kept, *gone):
        await dicts.update(item.object_id, [(b"k", b"v")], ME, if_not_exists=False)
    told: list[str] = []
    objects.when_deleted.append(told.append)
    await objects.delete_in("en-dev")
    assert sorted(told) == sorted(item.object_id for item in gone)
    assert await dicts.count(kept.object_id, ME) == 1
    for item in gone:
        with pytest.raises(NotFound):
            await dicts.count(item.object_id, ME)


async def test_what_an_app_owns_ends_with_it(objects):
    owned = await objects.create_anonymous("", ME, app_id="ap-1")
    other = await objects.create_anonymous("", ME, app_id="ap-2")
    await objects.delete_owned_by("ap-1")
    with pytest.raises(NotFound):
        await objects.get(owned.object_id, ME)
    await objects.get(other.object_id, ME)


async def test_an_app_that_is_not_there_owns_nothing(objects):
    def no_app(app_id, caller):
        raise NotFound(f"there is no App {app_id}")

    objects.check_owner = no_app
    with pytest.raises(NotFound, match="no App ap-1"):
        await objects.create_anonymous("", ME, app_id="ap-1")
    await objects.create_anonymous("", ME)


@pytest.mark.parametrize("name", ["", "has space", "has/slash", "ü", "a" * 65, "ap-0123456789012345678901", "a\n"])
async def test_bad_names_are_refused(objects, name):
    with pytest.raises(InvalidArgument, match="cannot be the name of a Dict"):
        await objects.create(name, "", ME, if_exists="return")


async def test_the_newest_are_listed_first_and_by_page(objects):
    names = [f"d{number:03}" for number in range(25)]
    for name in names:
        await objects.create(name, "", ME, if_exists="fail")
    await objects.create_anonymous("", ME)
    await objects.create("elsewhere", "dev", ME, if_exists="fail")
    listed, before = [], 0.0
    while True:
        environment, page = await objects.list_named("", ME, before, 10)
        listed += [item.name for item in page]
        if len(page) < 10:
            break
        before = page[-1].created_at
    assert environment == "main"
    assert listed == names[::-1]


async def test_an_id_is_of_one_noun_and_one_workspace(database, objects):
    item = await objects.create("x", "", ME, if_exists="fail")
    queues = NamedObjects("queue", database, ShiftedClock(), SomeEnvironments(), lambda c, object_id: None)
    for where, caller in ((queues, ME), (objects, STRANGER)):
        with pytest.raises(NotFound):
            await where.get(item.object_id, caller)
        with pytest.raises(NotFound):
            await where.delete(item.object_id, caller)
        assert await where.describe({item.object_id}, caller) == {}
    assert set(await objects.describe({item.object_id, "di-nope"}, ME)) == {item.object_id}


async def test_an_ephemeral_object_gets_time_to_come_back_after_a_restart(database, objects, clock):
    item = await objects.create_anonymous("", ME)
    clock.advance(100_000)
    again = NamedObjects("dict", database, clock, SomeEnvironments(), lambda c, object_id: None)
    await again.open()
    try:
        await again.sweep()
        await again.heartbeat(item.object_id, ME)
        clock.advance(1000)
        await again.sweep()
        with pytest.raises(NotFound):
            await again.heartbeat(item.object_id, ME)
    finally:
        await again.close()
