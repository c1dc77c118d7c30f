from collections.abc import AsyncIterator

import pytest
import sqlalchemy as sa
from some_environments import ME, STRANGER, ShiftedClock, SomeEnvironments

from aeolian.control.secrets import MAX_BYTES, MAX_KEYS, Secrets
from aeolian.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from aeolian.storage.database import Database
from aeolian.storage.secrets import secret_values

KEY = bytes(range(32))


@pytest.fixture
def clock() -> ShiftedClock:
    return ShiftedClock()


@pytest.fixture
async def secrets(database: Database, clock: ShiftedClock) -> AsyncIterator[Secrets]:
    secrets = Secrets(database, clock, SomeEnvironments(), KEY)
    await secrets.objects.open()
    yield secrets
    await secrets.objects.close()


async def make(secrets: Secrets, name: str, **env: str) -> str:
    return (await secrets.create(name, "", ME, env, if_exists="fail")).object_id


async def test_variables_of_later_secrets_win(secrets):
    one = await make(secrets, "one", A="1", B="1")
    two = await make(secrets, "two", B="2", C="ü\n=")
    assert await secrets.env_of([one, two]) == {"A": "1", "B": "2", "C": "ü\n="}
    assert await secrets.env_of([two, one]) == {"A": "1", "B": "1", "C": "ü\n="}


async def test_values_are_encrypted_at_rest_and_bound_to_their_secret(secrets, database):
    one = await make(secrets, "one", PASSWORD="open sesame")
    two = await make(secrets, "two", PASSWORD="open sesame")
    rows = await database.read(lambda c: {row.secret_id: row.encrypted for row in c.execute(sa.select(secret_values))})
    assert rows[one] != rows[two]
    assert all(b"sesame" not in encrypted and b"PASSWORD" not in encrypted for encrypted in rows.values())
    await database.write(
        lambda c: c.execute(secret_values.update().where(secret_values.c.secret_id == two).values(encrypted=rows[one]))
    )
    with pytest.raises(FailedPrecondition, match=f"{two} cannot be decrypted"):
        await secrets.env_of([two])


async def test_without_its_key_a_secret_says_what_to_do(secrets, database, clock):
    one = await make(secrets, "one", A="1")
    stranger = Secrets(database, clock, SomeEnvironments(), bytes(32))
    with pytest.raises(FailedPrecondition, match="Restore keys/secrets, or create the Secret again"):
        await stranger.env_of([one])


async def test_an_update_adds_replaces_and_removes(secrets):
    one = await make(secrets, "one", A="1", B="1")
    await secrets.update(one, ME, {"B": "2", "C": "3", "A": None})
    assert await secrets.env_of([one]) == {"B": "2", "C": "3"}
    assert (await secrets.info(one, ME)).keys == ("B", "C")
    with pytest.raises(InvalidArgument):
        await secrets.update(one, ME, {"D": "4", "bad key": "5"})
    assert await secrets.env_of([one]) == {"B": "2", "C": "3"}


async def test_a_name_is_returned_refused_or_replaced(secrets):
    one = await make(secrets, "one", A="1")
    with pytest.raises(AlreadyExists):
        await make(secrets, "one", A="2")
    assert (await secrets.create("one", "", ME, {"A": "3"}, if_exists="return")).object_id == one
    assert await secrets.env_of([one]) == {"A": "1"}
    assert (await secrets.create("one", "", ME, {"B": "4"}, if_exists="replace")).object_id == one
    assert await secrets.env_of([one]) == {"B": "4"}


async def test_required_keys_that_are_missing_are_named(secrets):
    one = await make(secrets, "one", A="1", B="1")
    assert (await secrets.lookup("one", "", ME, ["B", "A"])).object_id == one
    with pytest.raises(FailedPrecondition, match=r"Secret is missing key\(s\): C, D\. 'one' has A, B"):
        await secrets.lookup("one", "", ME, ["D", "A", "C"])
    with pytest.raises(NotFound, match="Secret 'two' not found in environment 'main'"):
        await secrets.lookup("two", "", ME, ["A"])


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"1A": ""}, "'1A' cannot be an environment variable"),
        ({"": ""}, "'' cannot be an environment variable"),
        ({"A=B": ""}, "'A=B' cannot be"),
        ({"A": "x\0y"}, "the value of A contains a null character"),
        ({"A": "x" * MAX_BYTES}, "the limit is 524,288"),
        ({f"A{n}": "" for n in range(MAX_KEYS + 1)}, "512 variables, not 513"),
    ],
)
async def test_what_no_environment_can_hold_is_refused(secrets, env, message):
    with pytest.raises(InvalidArgument, match=message):
        await secrets.create("bad", "", ME, env, if_exists="fail")
    with pytest.raises(InvalidArgument, match=message):
        await secrets.create_anonymous("", ME, env)
    with pytest.raises(NotFound):
        await secrets.lookup("bad", "", ME)


async def test_the_last_use_is_recorded(secrets, clock):
    one = await make(secrets, "one", A="1")
    assert (await secrets.info(one, ME)).last_used_at == 0
    await secrets.env_of([one])
    used_at = (await secrets.info(one, ME)).last_used_at
    assert abs(used_at - clock.now()) < 60
    clock.advance(3600)
    await secrets.env_of([one])
    assert (await secrets.info(one, ME)).last_used_at > used_at


async def test_a_secret_that_is_gone_or_another_s_is_not_there(secrets):
    one = await make(secrets, "one", A="1")
    for attempt in (secrets.info(one, STRANGER), secrets.update(one, STRANGER, {"A": "2"})):
        with pytest.raises(NotFound):
            await attempt
    await secrets.objects.delete(one, ME)
    with pytest.raises(NotFound, match="was deleted: create it again"):
        await secrets.env_of([one])
    with pytest.raises(NotFound):
        await secrets.info(one, ME)


async def test_an_ephemeral_secret_lives_a_day_after_its_last_use(secrets, clock):
    one = (await secrets.create_anonymous("", ME, {"A": "1"})).object_id
    for _ in range(3):
        clock.advance(20 * 3600)
        await secrets.objects.sweep()
        assert await secrets.env_of([one]) == {"A": "1"}
    clock.advance(25 * 3600)
    await secrets.objects.sweep()
    with pytest.raises(NotFound):
        await secrets.env_of([one])


async def test_equal_variables_have_equal_fingerprints_that_tell_nothing(secrets, database, clock):
    one, two = await make(secrets, "one", A="1", B="2"), await make(secrets, "two", B="2", A="1")
    other = await make(secrets, "other", A="1", B="3")
    assert await secrets.fingerprint([one]) == await secrets.fingerprint([two])
    assert await secrets.fingerprint([one]) != await secrets.fingerprint([other])
    assert await secrets.fingerprint([]) == ""
