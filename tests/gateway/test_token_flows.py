import pytest
from aiohttp import ClientSession, FormData

from aeolian.control.audit import AuditTrail
from aeolian.control.token_flows import TokenFlows
from aeolian.control.tokens import Tokens
from aeolian.domain.clock import SystemClock
from aeolian.gateway.app import Gateway
from aeolian.gateway.token_flows import MAX_FORM_BYTES, TokenFlowPages
from aeolian.storage import migrate
from aeolian.storage.database import Database


class Pages:
    def __init__(self, database: Database):
        clock = SystemClock()
        self.tokens = Tokens(database, clock, b"key")
        self.flows = TokenFlows(self.tokens, clock)
        self.trail = AuditTrail(database, clock)
        self.url = ""

    async def post(self, flow_id: str, data) -> tuple[int, str]:
        async with ClientSession() as session, session.post(f"{self.url}/token-flow/{flow_id}", data=data) as answer:
            return answer.status, await answer.text()


@pytest.fixture
async def pages(tmp_path):
    url = f"sqlite:///{tmp_path / 'aeolian.db'}"
    migrate.upgrade(url)
    database = Database(url)
    database.open()
    pages = Pages(database)
    gateway = Gateway(TokenFlowPages(pages.flows, pages.trail).routes())
    pages.url = f"http://127.0.0.1:{await gateway.start_tcp('127.0.0.1')}"
    yield pages
    await gateway.stop()
    await database.close()


async def test_the_page_may_not_be_framed_or_kept_and_loads_nothing(pages):
    flow = pages.flows.ask(0)
    async with ClientSession() as session, session.get(f"{pages.url}/token-flow/{flow.flow_id}") as answer:
        assert answer.status == 200 and flow.code not in await answer.text()
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "form-action 'self'" in policy
    assert answer.headers["Cache-Control"] == "no-store"


async def test_who_approves_is_in_the_audit_trail_and_no_secret_is(pages):
    token_id, secret = await pages.tokens.create("ann", "local")
    flow = pages.flows.ask(0)
    form = {"code": flow.code, "token_id": token_id, "token_secret": secret}
    assert (await pages.post(flow.flow_id, {**form, "token_secret": "<b>"}))[0] == 403
    status, text = await pages.post(flow.flow_id, form)
    assert status == 200 and flow.token[1] not in text
    [entry] = await pages.trail.entries()
    assert (entry.who, entry.action, entry.target) == ("ann", "token flow", flow.flow_id)
    assert (await pages.post(flow.flow_id, form))[0] == 403


async def test_what_is_typed_is_shown_as_text(pages):
    flow = pages.flows.ask(0)
    form = {"code": flow.code, "token_id": "<script>alert(1)</script>", "token_secret": "x"}
    status, text = await pages.post(flow.flow_id, form)
    assert status == 403 and "&lt;script&gt;" in text and "<script>" not in text


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"x" * (MAX_FORM_BYTES + 1), 413, id="too large"),
        pytest.param(b"code=%ff%fe&token_id=\xff", 403, id="no text"),
        pytest.param(FormData({"code": "x"}, charset="utf-8"), 403, id="half of a form"),
        pytest.param(b"", 403, id="nothing"),
    ],
)
async def test_what_is_no_form_is_refused(pages, data, status):
    flow = pages.flows.ask(0)
    assert (await pages.post(flow.flow_id, data))[0] == status


async def test_a_flow_that_is_over_has_no_page(pages):
    assert (await pages.post("tf-0", {"code": "x"}))[0] == 403
    async with ClientSession() as session, session.get(f"{pages.url}/token-flow/tf-0") as answer:
        assert answer.status == 404
