import asyncio

import msgspec
import pytest
import sqlalchemy as sa
from some_environments import ME, ShiftedClock

from aeolian.control.environments import RECHECK_S, Environments
from aeolian.domain.clock import ManualClock
from aeolian.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from aeolian.storage import migrate
from aeolian.storage.database import Database


async def loaded(database: Database) -> Environments:
    environments = Environments(database, ShiftedClock())
    await environments.load()
    return environments


@pytest.fixture
async def environments(database: Database) -> Environments:
    return await loaded(database)


async def test_there_is_a_default_one_from_the_start_and_it_stays(environments, database):
    assert environments.default.name == "main"
    assert environments.resolve("", ME) == environments.resolve("main", ME) == environments.default
    again = await loaded(database)
    assert again.default == environments.default
    with pytest.raises(FailedPrecondition, match="'main' is the default environment"):
        await again.delete("main", ME)


async def test_a_name_names_one_environment(environments, database):
    dev = await environments.create("dev")
    with pytest.raises(AlreadyExists, match="'dev' already exists"):
        await environments.create("dev")
    assert (await loaded(database)).resolve("dev", ME).id == dev.id
    assert environments.by_id(dev.id) == dev
    with pytest.raises(NotFound, match=r"no environment 'prod', which .* \(there are: dev, main\)"):
        environments.resolve("prod", ME)


async def test_of_two_who_make_one_name_one_succeeds(environments):
    outcomes = await asyncio.gather(*(environments.create("dev") for _ in range(2)), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AlreadyExists", "Environment"]


@pytest.mark.parametrize("name", ["", "-dev", ".dev", "has space", "a/b", "ü", "x" * 65, "en-dev", "EN-dev", "dev\n"])
async def test_bad_names_are_refused(environments, name):
    with pytest.raises(InvalidArgument, match="cannot be the name of an environment"):
        await environments.create(name)
    with pytest.raises(InvalidArgument, match="cannot be the name of an environment"):
        await environments.update("main", ME, new_name=name)


async def test_a_container_s_default_is_its_own_environment(environments):
    dev = await environments.create("dev")
    container = msgspec.structs.replace(ME, token_id="", task_id="ta-1", environment_name="dev")
    assert environments.resolve("", container) == dev
    assert environments.resolve("main", container) == environments.default


async def test_a_container_finds_its_environment_under_the_name_that_it_was_started_with(environments):
    dev = await environments.create("dev")
    await environments.update("dev", ME, new_name="stage")
    container = msgspec.structs.replace(
        ME, token_id="", task_id="ta-1", environment_name="stage", environment_was="dev"
    )
    await environments.create("dev")
    for name in ("", "dev", "stage"):
        assert environments.resolve(name, container).id == dev.id
    assert environments.resolve("dev", ME).id != dev.id


async def test_a_renamed_environment_keeps_its_id_and_tells(environments, database):
    dev = await environments.create("dev")
    told = []

    async def renamed(environment_id: str, name: str) -> None:
        told.append((environment_id, name))

    environments.when_renamed.append(renamed)
    await environments.update("dev", ME, new_name="stage", web_suffix="s")
    assert told == [(dev.id, "stage")]
    assert (await loaded(database)).resolve("stage", ME).web_suffix == "s"
    with pytest.raises(NotFound):
        environments.resolve("dev", ME)
    await environments.create("dev")
    with pytest.raises(AlreadyExists):
        await environments.update("dev", ME, new_name="stage")
    with pytest.raises(InvalidArgument, match="web suffix"):
        await environments.update("stage", ME, web_suffix="Not This")
    with pytest.raises(InvalidArgument, match="no image builder version"):
        await environments.update("stage", ME, image_builder_version="1999.12")


async def test_what_is_in_an_environment_goes_first_and_nothing_new_comes_in(environments, database):
    dev = await environments.create("dev")
    seen = []

    async def deleted(environment_id: str, who: str) -> None:
        with pytest.raises(NotFound):
            environments.resolve("dev", ME)
        with pytest.raises(AlreadyExists):
            await environments.create("dev")
        seen.append((environment_id, who))

    environments.when_deleted.append(deleted)
    await environments.delete("dev", ME)
    assert seen == [(dev.id, "local")]
    with pytest.raises(NotFound):
        await environments.delete("dev", ME)
    assert [environment.name for environment in (await loaded(database)).all()] == ["main"]


async def test_an_environment_that_cannot_be_emptied_stays(environments):
    async def fails(environment_id: str, who: str) -> None:
        raise FailedPrecondition("the disk is full")

    dev = await environments.create("dev")
    environments.when_deleted.append(fails)
    with pytest.raises(FailedPrecondition, match="disk is full"):
        await environments.delete("dev", ME)
    assert environments.resolve("dev", ME) == dev


async def test_an_old_sdk_hears_of_no_builder_version_that_it_does_not_know(environments):
    after = await environments.update("main", ME, image_builder_version="2026.10")
    old = msgspec.structs.replace(ME, sdk_version="1.5.5")
    assert environments.builder_version_for(after, ME) == "2026.10"
    assert environments.builder_version_for(after, old) == "2025.06"


async def test_limits_that_another_process_sets_are_known_within_seconds_and_the_last_ones_hold_without_a_database(
    tmp_path,
):
    url = f"sqlite:///{tmp_path / 'aeolian.db'}"
    migrate.upgrade(url)
    ours, theirs, clock = Database(url), Database(url), ManualClock()
    for database in (ours, theirs):
        database.open()
    server, command = Environments(ours, clock), Environments(theirs, clock)
    await server.load()
    await command.load()
    await command.set_limits("main", ME, max_containers=3)
    await server.keep_fresh()
    assert server.default.max_containers == 0
    clock.advance(RECHECK_S + 0.1)
    await server.keep_fresh()
    assert server.default.max_containers == 3
    await theirs.write(lambda c: c.execute(sa.text("ALTER TABLE environments RENAME TO elsewhere")))
    clock.advance(RECHECK_S + 0.1)
    await server.keep_fresh()
    assert server.default.max_containers == 3
    for database in (ours, theirs):
        await database.close()
