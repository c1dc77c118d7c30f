import pytest
from modal_proto import api_pb2

from aeolian.control.apps import Apps
from aeolian.control.definitions import WebFunction
from aeolian.control.environments import Environments
from aeolian.control.function_changes import FunctionChanges
from aeolian.control.functions import Functions
from aeolian.control.logs import AppLogs
from aeolian.control.web_urls import WebUrls, label_of
from aeolian.domain.apps import AppState
from aeolian.domain.caller import Caller
from aeolian.domain.clock import ManualClock
from aeolian.domain.errors import ResourceExhausted
from aeolian.domain.web import Site
from aeolian.storage.database import Database, metadata

ME = Caller(workspace="local", token_id="ak-1")


class SomePorts:
    """Ports that nobody listens on. `taken` are other programs'."""

    def __init__(self):
        self.taken: set[int] = set()
        self.open_ports: set[int] = set()

    def open(self, port: int) -> int | None:
        if port in self.taken:
            return None
        port = port or 40000 + len(self.open_ports)
        self.open_ports.add(port)
        return port

    def close(self, port: int) -> None:
        self.open_ports.discard(port)


class Nothing:
    async def describe(self, object_ids, caller):
        return {}


class Web:
    """Web URLs over one database file."""

    def __init__(self, path, ports: SomePorts, site: Site):
        self.database = Database(f"sqlite:///{path}")
        metadata.create_all(self.database.engine)
        self.clock, self.ports, self.site = ManualClock(), ports, site

    async def __aenter__(self) -> "Web":
        self.database.open()
        self.logs = AppLogs(self.database, self.clock)
        await self.logs.open()
        environments = Environments(self.database, self.clock)
        await environments.load()
        self.apps = Apps(self.database, self.clock, environments, self.logs)
        self.urls = WebUrls(self.database, self.clock, self.apps, environments, self.ports, self.site)
        self.functions = self.urls.functions = Functions(self.database, self.apps, self.urls.address_of)
        self.changes = FunctionChanges(self.database, self.clock, self.apps, self.functions, Nothing(), self.urls)
        await self.apps.load()
        await self.functions.load()
        await self.urls.load()
        return self

    async def __aexit__(self, *exc) -> None:
        await self.apps.close()
        await self.logs.close()
        await self.database.close()

    async def serve(
        self, app_name: str, name: str = "page", *, label: str = "", app_id: str = ""
    ) -> tuple[str, str, str]:
        """A new web function of an app that `modal run` has begun: its App, its id, and its URL."""
        if not app_id:
            app = await self.apps.create(ME, AppState.EPHEMERAL, app_name, "", {})
            app_id = app.app_id
        webhook = api_pb2.WebhookConfig(type=api_pb2.WEBHOOK_TYPE_ASGI_APP, requested_suffix=label)
        function = api_pb2.Function(function_name=name, webhook_config=webhook)
        self.clock.advance(1)
        function_id, definition = await self.changes.create(
            api_pb2.FunctionCreateRequest(app_id=app_id, function=function), ME
        )
        handle, data = self.changes.created(function_id, definition)
        assert data.ranked_functions[0].function.web_url == handle.web_url
        return app_id, function_id, handle.web_url


@pytest.fixture
def ports():
    return SomePorts()


@pytest.fixture
def web(tmp_path, ports):
    return lambda site=PORTS: Web(tmp_path / "a.db", ports, site)


PORTS = Site("http", "127.0.0.1", first_port=9910)
DOMAIN = Site("https", "127.0.0.1", "example.com")


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({}, "local--shop-page"),
        ({"web_suffix": "staging"}, "local-staging--shop-page"),
        ({"is_deployed": False}, "local--shop-page-dev"),
        ({"is_deployed": False, "ephemeral_suffix": "anna"}, "local--shop-page-anna"),
        ({"requested_suffix": "front"}, "local--front"),
        ({"requested_suffix": "front", "is_deployed": False}, "local--front-dev"),
        ({"function_name": "Cart.show_all"}, "local--shop-cart-show-all"),
        ({"app_name": "Größe 7"}, "local--gr-e-7-page"),
    ],
)
def test_a_label_follows_from_names(fields, label):
    kwargs = {"workspace": "local", "web_suffix": "", "app_name": "shop", "is_deployed": True}
    names = {"function_name": "page"}
    for key, value in fields.items():
        (kwargs if key in kwargs else names)[key] = value
    assert label_of(WebFunction(function_id="fu-1", method_name="", app_id="ap-1", **names), **kwargs) == (label, False)


def test_names_that_are_too_long_are_cut_and_stay_apart():
    def label(name: str):
        function = WebFunction(function_id="fu-1", method_name="", app_id="ap-1", function_name=name)
        return label_of(function, workspace="local", web_suffix="", app_name="a" * 50, is_deployed=True)

    one, other = label("first_of_many"), label("first_of_many_others")
    assert one.is_truncated and one != other
    assert len(one.label) <= 63 and one.label.startswith(f"local--{'a' * 49}")


async def test_each_web_function_has_a_port_that_it_keeps(web, ports):
    async with web() as before:
        _, function_id, url = await before.serve("shop")
        _, _, other_url = await before.serve("bank")
        assert (url, other_url) == ("http://127.0.0.1:9910", "http://127.0.0.1:9911")
        assert before.urls.at_port(9910).function_id == function_id
        assert before.urls.at_port(9999) is None and not before.urls.is_ours(9999)
    ports.open_ports.clear()
    async with web() as after:
        assert ports.open_ports == {9910, 9911}
        assert after.urls.at_port(9910).function_id == function_id
        assert after.functions.handle(function_id).web_url == url


async def test_a_port_that_another_program_has_is_passed_over(web, ports):
    ports.taken = {9910}
    async with web() as one:
        _, function_id, url = await one.serve("shop")
        assert url == "http://127.0.0.1:9911"
    ports.taken = {9911}
    async with web() as one:
        assert one.functions.handle(function_id).web_url == "http://127.0.0.1:9910"
    async with web() as one:
        assert one.functions.handle(function_id).web_url == "http://127.0.0.1:9910"


async def test_an_app_that_comes_back_to_a_taken_port_gets_another(web, ports):
    async with web() as one:
        app_id, _, _ = await one.serve("shop")
        await one.urls._app_ended(app_id)
    ports.taken = {9910}
    async with web() as one:
        assert (await one.serve("shop"))[2] == "http://127.0.0.1:9911"


async def test_an_app_that_comes_back_has_its_old_url(web):
    async with web() as one:
        app_id, function_id, url = await one.serve("shop")
        assert await one.urls._app_ended(app_id) is None
        assert one.urls.is_ours(9910) and one.urls.at_port(9910) is None
        _, again_id, again = await one.serve("shop")
        assert again == url and again_id != function_id
        assert one.urls.at_port(9910).function_id == again_id


async def test_whoever_takes_a_label_last_has_it_until_it_ends(web):
    async with web(DOMAIN) as one:
        _, first_id, url = await one.serve("shop", label="front")
        second_app, second_id, second_url = await one.serve("bank", label="front")
        assert url == second_url == "https://local--front-dev.example.com"
        host = "local--front-dev.example.com:443"
        assert one.urls.at_host(host).function_id == second_id
        data = one.functions.function_data(second_id).ranked_functions[0].function
        assert data.web_url_info.label_stolen
        assert not one.functions.function_data(first_id).ranked_functions[0].function.web_url_info.label_stolen
        await one.urls._app_ended(second_app)
        assert one.urls.at_host(host).function_id == first_id


async def test_hosts_are_told_apart_whatever_their_case_and_port(web):
    async with web(DOMAIN) as one:
        _, function_id, _ = await one.serve("shop")
        assert one.urls.at_host("LOCAL--shop-page-dev.Example.com.:8443").function_id == function_id
        assert one.urls.at_host("local--other.example.com") is None
        for host in ("example.com", "127.0.0.1:9901", "", "local--shop-page-dev.example.org"):
            assert one.urls.label_in(host) == ""


async def test_ports_run_out_and_labels_without_a_function_give_theirs(web, ports, monkeypatch):
    monkeypatch.setattr("aeolian.control.web_urls.MAX_PORTS", 2)
    async with web() as one:
        app_id, _, url = await one.serve("shop")
        await one.serve("bank")
        with pytest.raises(ResourceExhausted, match="no port is free"):
            await one.serve("third")
        await one.urls._app_ended(app_id)
        assert (await one.serve("third"))[2] == url


async def test_labels_that_nobody_has_for_long_are_forgotten(web, ports):
    async with web() as one:
        app_id, _, _ = await one.serve("shop")
        await one.urls._app_ended(app_id)
        clock = one.clock
    ports.open_ports.clear()
    later = web()
    later.clock = clock
    clock.advance(40 * 24 * 3600)
    async with later:
        assert ports.open_ports == set()
