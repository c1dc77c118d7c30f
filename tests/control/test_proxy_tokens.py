import pytest

from aeolian.control.environments import Environments
from aeolian.control.proxy_tokens import ProxyTokens
from aeolian.domain.caller import Caller
from aeolian.domain.clock import ManualClock
from aeolian.domain.errors import FailedPrecondition, InvalidArgument, NotFound
from aeolian.storage.database import Database, metadata

ME = Caller(workspace="local", token_id="ak-1", name="anna")
STRANGER = Caller(workspace="elsewhere", token_id="ak-2")


@pytest.fixture
async def database(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    metadata.create_all(database.engine)
    database.open()
    yield database
    await database.close()


@pytest.fixture
async def environments(database):
    environments = Environments(database, ManualClock())
    await environments.load()
    return environments


@pytest.fixture
async def tokens(database, environments):
    tokens = ProxyTokens(database, ManualClock(), environments, b"key")
    await tokens.load()
    return tokens


async def test_the_secret_opens_every_environment_of_its_workspace(tokens, environments):
    token_id, secret = await tokens.create(ME, "web", is_scoped=False)
    main = environments.default.id
    assert token_id.startswith("wk-") and secret.startswith("ws-")
    assert tokens.allows(token_id, secret, "local", main)
    assert not tokens.allows(token_id, secret + "x", "local", main)
    assert not tokens.allows("wk-other", secret, "local", main)
    assert not tokens.allows(token_id, secret, "elsewhere", main)
    (token,) = tokens.all(ME)
    assert (token.name, token.created_by) == ("web", "anna") and secret.encode() not in token.secret_hash


async def test_a_token_that_is_allowed_to_an_environment_is_for_no_other(tokens, environments):
    other = await environments.create("other")
    token_id, secret = await tokens.create(ME, "", is_scoped=False)
    await tokens.allow(token_id, other.id, ME)
    assert tokens.allows(token_id, secret, "local", other.id)
    assert not tokens.allows(token_id, secret, "local", environments.default.id)
    await tokens.revoke(token_id, other.id, ME)
    assert not tokens.allows(token_id, secret, "local", other.id)


async def test_what_is_for_everything_cannot_be_revoked_for_one(tokens, environments):
    token_id, _ = await tokens.create(ME, "", is_scoped=False)
    with pytest.raises(FailedPrecondition, match="proxy-tokens allow"):
        await tokens.revoke(token_id, environments.default.id, ME)


async def test_deleted_tokens_open_nothing_also_after_a_restart(tokens, environments, database):
    kept_id, kept = await tokens.create(ME, "kept", is_scoped=False)
    gone_id, gone = await tokens.create(ME, "gone", is_scoped=False)
    await tokens.rename(kept_id, "renamed", ME)
    await tokens.delete(gone_id, ME)
    await tokens.delete(gone_id, ME)
    again = ProxyTokens(database, ManualClock(), environments, b"key")
    await again.load()
    for one in (tokens, again):
        assert one.allows(kept_id, kept, "local", environments.default.id)
        assert not one.allows(gone_id, gone, "local", environments.default.id)
        assert [token.name for token in one.all(ME)] == ["renamed"]


async def test_tokens_of_others_are_not_there(tokens, environments):
    token_id, secret = await tokens.create(ME, "", is_scoped=False)
    assert tokens.all(STRANGER) == []
    for change in (tokens.rename(token_id, "x", STRANGER), tokens.allow(token_id, environments.default.id, STRANGER)):
        with pytest.raises(NotFound, match="proxy-tokens list"):
            await change
    await tokens.delete(token_id, STRANGER)
    assert tokens.allows(token_id, secret, "local", environments.default.id)


async def test_bad_names_and_environments_are_refused(tokens):
    with pytest.raises(InvalidArgument):
        await tokens.create(ME, "x" * 1000, is_scoped=False)
    token_id, _ = await tokens.create(ME, "", is_scoped=False)
    with pytest.raises(NotFound):
        await tokens.allow(token_id, "en-missing", ME)


async def test_a_repeated_request_gets_the_same_token_also_after_a_restart(tokens, environments, database):
    made = await tokens.create(ME, "web", is_scoped=False, once="WebhookTokenCreate/ak-1/1")
    again = ProxyTokens(database, ManualClock(), environments, b"key")
    await again.load()
    for one in (tokens, again):
        assert await one.create(ME, "web", is_scoped=False, once="WebhookTokenCreate/ak-1/1") == made
        assert len(one.all(ME)) == 1
    assert await tokens.create(ME, "web", is_scoped=False) != made
