import asyncio
from collections.abc import AsyncIterator

import pytest

from aeolian.control.token_flows import LIFETIME_S, MAX_ATTEMPTS, MAX_OPEN, TokenFlows
from aeolian.control.tokens import Tokens
from aeolian.domain.clock import ManualClock
from aeolian.domain.errors import NotFound, PermissionDenied, ResourceExhausted
from aeolian.domain.roles import Role
from aeolian.storage.database import Database

ROLES = {"en-1": Role.VIEWER}


class Some:
    def __init__(self, database: Database):
        self.clock = ManualClock()
        self.tokens = Tokens(database, self.clock, b"key")
        self.flows = TokenFlows(self.tokens, self.clock)


@pytest.fixture
async def some(database: Database) -> AsyncIterator[Some]:
    yield Some(database)


async def test_the_new_token_may_do_what_the_one_that_approves_may_and_ends_no_later(some):
    token = await some.tokens.create("ann", "local", roles=ROLES, expires_at=some.clock.now() + 500)
    flow = some.flows.ask(lifetime_s=1000)
    waits = asyncio.create_task(some.flows.wait(flow.flow_id, flow.wait_secret, 10))
    typed = f" {flow.code[:4]}-{flow.code[4:].lower()} "
    assert (await some.flows.approve(flow.flow_id, typed, *token)).name == "ann"
    assert await waits is flow and flow.token is not None
    made = await some.tokens.get(flow.token[0])
    assert (made.name, made.roles, made.created_by) == ("ann", ROLES, "ann")
    assert made.expires_at == some.clock.now() + 500


async def test_it_is_approved_once(some):
    token = await some.tokens.create("ann", "local")
    flow = some.flows.ask(0)
    await some.flows.approve(flow.flow_id, flow.code, *token)
    with pytest.raises(NotFound, match="already"):
        await some.flows.approve(flow.flow_id, flow.code, *token)
    assert len(await some.tokens.all()) == 2


async def test_only_whoever_asked_gets_the_token(some):
    flow = some.flows.ask(0)
    with pytest.raises(NotFound):
        await some.flows.wait(flow.flow_id, "guessed", 0)
    assert await some.flows.wait(flow.flow_id, flow.wait_secret, 0) is None


async def test_a_wrong_code_or_token_approves_nothing_and_guessing_ends(some):
    token_id, secret = await some.tokens.create("ann", "local")
    flow = some.flows.ask(0)
    with pytest.raises(PermissionDenied, match="secret is wrong"):
        await some.flows.approve(flow.flow_id, flow.code, token_id, "as-wrong")
    for _ in range(MAX_ATTEMPTS - 1):
        with pytest.raises(PermissionDenied, match="not the code"):
            await some.flows.approve(flow.flow_id, "ABCDEFGH", token_id, secret)
    with pytest.raises(PermissionDenied, match="too often"):
        await some.flows.approve(flow.flow_id, flow.code, token_id, secret)
    with pytest.raises(NotFound, match="modal token new"):
        await some.flows.approve(flow.flow_id, flow.code, token_id, secret)
    assert len(await some.tokens.all()) == 1


async def test_what_nobody_approves_ends_and_makes_room(some):
    flows = [some.flows.ask(0) for _ in range(MAX_OPEN)]
    with pytest.raises(ResourceExhausted, match="try again"):
        some.flows.ask(0)
    some.clock.advance(LIFETIME_S)
    with pytest.raises(NotFound):
        some.flows.find(flows[0].flow_id)
    some.flows.ask(0)
