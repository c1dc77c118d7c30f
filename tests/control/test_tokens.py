from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aeolian.control.tokens import RECHECK_S, Tokens
from aeolian.domain.clock import ManualClock
from aeolian.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unauthenticated
from aeolian.domain.roles import Role
from aeolian.storage import migrate
from aeolian.storage.database import Database

VIEWER = {"en-1": Role.VIEWER}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def databases(tmp_path: Path) -> AsyncIterator[tuple[Database, Database]]:
    """Two processes' views of one database: the server's, and that of a command beside it."""
    url = f"sqlite:///{tmp_path / 'aeolian.db'}"
    migrate.upgrade(url)
    pair = Database(url), Database(url)
    for database in pair:
        database.open()
    yield pair
    for database in pair:
        await database.close()


@pytest.fixture
def server(databases, clock) -> Tokens:
    return Tokens(databases[0], clock, b"key")


@pytest.fixture
def command(databases, clock) -> Tokens:
    return Tokens(databases[1], clock, b"")


def metadata(token: tuple[str, str]) -> dict[str, str]:
    return {"x-modal-token-id": token[0], "x-modal-token-secret": token[1], "x-modal-client-version": "1.6.4"}


async def test_a_token_made_by_another_process_works_at_once(server, command):
    token = await command.create("ci", "local")
    caller = await server.authenticate(metadata(token))
    assert (caller.workspace, caller.token_id, caller.sdk_version) == ("local", token[0], "1.6.4")


async def test_a_secret_that_is_wrong_is_refused(server, command):
    token_id, _ = await command.create("ci", "local")
    with pytest.raises(Unauthenticated, match="secret is wrong"):
        await server.authenticate(metadata((token_id, "as-wrong")))
    with pytest.raises(Unauthenticated, match="carries no token"):
        await server.authenticate({})


async def test_a_token_deleted_or_disabled_by_another_process_is_refused_within_seconds(server, command, clock):
    deleted, disabled = await command.create("one", "local"), await command.create("two", "local")
    for token in (deleted, disabled):
        await server.authenticate(metadata(token))
    await command.delete(deleted[0])
    await command.set_disabled(disabled[0], True)
    clock.advance(RECHECK_S + 0.1)
    with pytest.raises(Unauthenticated, match="not one of this server"):
        await server.authenticate(metadata(deleted))
    with pytest.raises(Unauthenticated, match="is disabled: `aeolian token enable"):
        await server.authenticate(metadata(disabled))
    await command.set_disabled(disabled[0], False)
    await server.authenticate(metadata(disabled))


async def test_what_the_server_itself_disables_is_refused_at_once(server):
    token = await server.create("one", "local")
    await server.authenticate(metadata(token))
    await server.set_disabled(token[0], True)
    with pytest.raises(Unauthenticated, match="disabled"):
        await server.authenticate(metadata(token))


async def test_a_token_expires(server, clock):
    token = await server.create("short", "local", expires_at=clock.now() + 60)
    await server.authenticate(metadata(token))
    clock.advance(61)
    with pytest.raises(Unauthenticated, match="expired"):
        await server.authenticate(metadata(token))


async def test_the_last_use_is_recorded(server, clock):
    token = await server.create("one", "local")
    await server.authenticate(metadata(token))
    (known,) = await server.all()
    assert known.last_used_at == clock.now()


async def test_an_unknown_token_cannot_be_changed(server):
    for change in (server.delete("ak-0"), server.set_disabled("ak-0", True)):
        with pytest.raises(NotFound, match="no token 'ak-0'"):
            await change


async def test_a_token_without_role_settings_manages_everything_and_one_with_some_has_those(server):
    everything, some, none = [await server.create("t", "local", roles=roles) for roles in (None, VIEWER, {})]
    roles = [(await server.authenticate(metadata(token))).roles for token in (everything, some, none)]
    assert roles == [None, VIEWER, {}]


async def test_a_role_that_another_process_gives_or_takes_counts_within_seconds(server, command, clock):
    token = await command.create("one", "local", roles=VIEWER)
    await server.authenticate(metadata(token))
    await command.set_role(token[0], "en-1", None)
    await command.set_role(token[0], "en-2", Role.MANAGER)
    clock.advance(RECHECK_S + 0.1)
    assert (await server.authenticate(metadata(token))).roles == {"en-2": Role.MANAGER}


async def test_what_manages_everything_gets_roles_only_once_it_is_limited(server):
    token = await server.create("one", "local")
    with pytest.raises(FailedPrecondition, match="aeolian token limit"):
        await server.set_role(token[0], "en-1", Role.VIEWER)
    await server.limit(token[0])
    await server.set_role(token[0], "en-1", Role.VIEWER)
    assert (await server.authenticate(metadata(token))).roles == VIEWER


async def test_a_service_user_begins_without_any_role_and_has_its_name_alone(server):
    user_id, token_id, secret = await server.create_service_user("bot", "local", created_by="ann")
    assert (await server.authenticate(metadata((token_id, secret)))).roles == {}
    assert (await server.service_user(name="bot")).service_user_id == user_id
    with pytest.raises(AlreadyExists, match="'bot' already exists"):
        await server.create_service_user("bot", "local")
    with pytest.raises(InvalidArgument, match="cannot be the name"):
        await server.create_service_user("a bot", "local")


async def test_the_roles_of_an_environment_go_with_it(server):
    token = await server.create("one", "local", roles={"en-1": Role.VIEWER, "en-2": Role.VIEWER})
    await server.environment_deleted("en-1")
    assert (await server.get(token[0])).roles == {"en-2": Role.VIEWER}
