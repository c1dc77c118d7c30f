"""Web functions, as their clients see them."""

import asyncio
import contextlib
import json
import re
import signal
import sys
import time
from pathlib import Path

import aiohttp
import pytest

SOURCE = (Path(__file__).parent / "programs/web_app.py").read_text()
URL = re.compile(r"https?://[0-9.:]+(?= )")

FASTAPI = """
import modal

app = modal.App("web-fastapi", image=modal.Image.debian_slim().pip_install("fastapi"))


@app.function()
@modal.fastapi_endpoint(method="POST", docs=True)
def double(number: int):
    return {"twice": 2 * number}


@app.local_entrypoint()
def main():
    import json
    import urllib.error
    import urllib.request

    url = double.get_web_url()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/?number=21", method="POST")) as reply:
        print(json.load(reply))
    for path, method in (("/?number=x", "POST"), ("/", "GET"), ("/nowhere", "POST"), ("/docs", "GET")):
        try:
            print(path, urllib.request.urlopen(urllib.request.Request(url + path, method=method)).status)
        except urllib.error.HTTPError as error:
            print(path, error.code)
"""


def urls_in(printed: str) -> dict[str, str]:
    """The URLs that a deployment printed, by the name before each."""
    found, name = {}, ""
    for line in printed.splitlines():
        if created := re.search(r"Created Function (\S+)|─ (\S+) ->", line):
            name = created.group(1) or created.group(2)
        if (url := URL.search(line)) and name:
            found[name] = url.group()
    return found


@pytest.fixture(scope="module")
def served(aeolian, tmp_path_factory):
    """The app, deployed: its folder, and its URLs by name."""
    folder = tmp_path_factory.mktemp("web")
    yield folder, urls_in(aeolian.deploy(SOURCE, folder))
    aeolian.modal("app", "stop", "web-app", "-y")


@pytest.fixture
async def http():
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=90)) as session:
        yield session


async def text_of(http: aiohttp.ClientSession, url: str, **kwargs) -> tuple[int, str]:
    async with http.get(url, **kwargs) as reply:
        return reply.status, await reply.text()


async def test_a_burst_on_a_cold_web_function_succeeds_whole(served, http):
    _, urls = served
    answers = await asyncio.gather(*(text_of(http, f"{urls['pages']}/version") for _ in range(200)))
    assert answers == [(200, "one")] * 200


async def test_what_the_app_does_not_know_or_cannot_do_is_answered(served, http):
    _, urls = served
    assert await text_of(http, f"{urls['pages']}/nowhere") == (404, "the app knows no such page")
    status, text = await text_of(http, f"{urls['pages']}/fail")
    assert status == 500 and "modal app logs" in text
    assert (await text_of(http, f"{urls['alone']}/seen"))[1].startswith("lifespan.startup")


async def test_large_bodies_stream_both_ways(served, http):
    _, urls = served
    num_bytes = 50 << 20

    async def body():
        for _ in range(50):
            yield bytes(1 << 20)

    async with http.post(f"{urls['pages']}/count", data=body()) as reply:
        assert await reply.text() == str(num_bytes)
    async with http.get(f"{urls['pages']}/zeros?{num_bytes}") as reply:
        assert sum([len(piece) async for piece in reply.content.iter_any()]) == num_bytes


async def test_the_app_hears_of_clients_that_go(served, http):
    url = served[1]["alone"]
    async with http.get(f"{url}/events_forever") as reply:
        assert [await reply.content.readline() for _ in range(3)] == [b"data: 0\n", b"\n", b"data: 1\n"]
        reply.close()
    async with http.ws_connect(f"{url}/chat", protocols=["talk"]) as socket:
        await socket.send_str("hello")
        assert await socket.receive_str() == "you said hello"
        assert socket.protocol == "talk"
        await socket.close(code=4321)
    until = time.monotonic() + 20
    while not {"client-gone", "closed-4321"} <= set((seen := await text_of(http, f"{url}/seen"))[1].split()):
        assert time.monotonic() < until, seen
        await asyncio.sleep(0.1)


async def test_classes_wsgi_and_web_servers_answer(served, http):
    _, urls = served
    async with http.post(urls["Shop.counter"], data=b"bread") as reply:
        assert await reply.text() == "POST True bread"
    status, text = await text_of(http, f"{urls['files']}/etc/passwd")
    assert status == 200 and "root" in text


async def test_a_guarded_web_function_wants_a_proxy_token(aeolian, served, http):
    _, urls = served
    url = f"{urls['guarded']}/version"
    made = json.loads(aeolian.modal("workspace", "proxy-tokens", "create", "--name", "e2e", "--json"))
    key = {name: made[name] for name in ("Modal-Key", "Modal-Secret")}
    assert (await text_of(http, url))[0] == 401
    assert (await text_of(http, url, headers={**key, "Modal-Secret": "ws-wrong"}))[0] == 401
    assert await text_of(http, url, headers=key) == (200, "one")
    with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
        await http.ws_connect(f"{urls['guarded']}/chat", protocols=["talk"])
    async with http.ws_connect(f"{urls['guarded']}/chat", protocols=["talk"], headers=key) as socket:
        assert socket.protocol == "talk"
    aeolian.modal_session(
        ("workspace proxy-tokens list", "e2e"),
        (f"workspace proxy-tokens delete -y {key['Modal-Key']}", "Deleted"),
    )
    assert (await text_of(http, url, headers=key))[0] == 401


async def test_a_redeployment_drops_no_request_and_keeps_the_url(aeolian, served, http):
    folder, urls = served
    answers: list[tuple[int, str]] = []
    is_deployed = asyncio.Event()

    async def ask() -> None:
        while not is_deployed.is_set() or answers[-1] != (200, "two"):
            answers.append(await text_of(http, f"{urls['pages']}/slow"))

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(ask())
        printed = await asyncio.to_thread(aeolian.deploy, SOURCE.replace('"one"', '"two"'), folder)
        is_deployed.set()
    assert urls_in(printed) == urls
    assert set(answers) == {(200, "one"), (200, "two")}


async def test_neither_a_killed_server_nor_a_killed_front_refuses_connections(aeolian, served, http):
    _, urls = served
    for name in ("server", "front"):
        aeolian.kill(name)
        answers = await asyncio.gather(*(text_of(http, f"{urls['pages']}/version") for _ in range(5)))
        assert [status for status, _ in answers] == [200] * 5


async def test_modal_serve_follows_the_source_at_one_url(aeolian, tmp_path, http):
    source = SOURCE.replace("web-app", "web-served")
    (tmp_path / "served.py").write_text(source)
    process = aeolian.start_command(sys.executable, "-m", "modal", "serve", "served.py", cwd=tmp_path)
    try:
        printed = ""
        while "Created Function files" not in printed or not urls_in(printed).get("files"):
            printed += await asyncio.to_thread(process.stdout.readline)
        url = urls_in(printed)["pages"]
        assert await text_of(http, f"{url}/version") == (200, "one")
        until, write_at = time.monotonic() + 90, 0.0
        answer = (200, "one")
        while answer != (200, "three"):
            with contextlib.suppress(aiohttp.ClientPayloadError):  # a reload ends containers in the middle of answers
                answer = await text_of(http, f"{url}/version")
            assert answer in ((200, "one"), (200, "three")) and time.monotonic() < until
            if time.monotonic() > write_at:  # a client that is busy may not see a change
                (tmp_path / "served.py").write_text(source.replace('"one"', '"three"'))
                write_at = time.monotonic() + 6
            await asyncio.sleep(0.2)
    finally:
        process.send_signal(signal.SIGINT)
        await asyncio.to_thread(process.communicate)
    until = time.monotonic() + 20
    while (await text_of(http, f"{url}/version"))[0] != 404:
        assert time.monotonic() < until
        await asyncio.sleep(0.1)


def test_a_fastapi_endpoint_checks_its_arguments(aeolian, tmp_path):
    printed = aeolian.run_app(FASTAPI, tmp_path)
    assert "{'twice': 42}" in printed
    for line in ("/?number=x 422", "/ 405", "/nowhere 404", "/docs 200"):
        assert line in printed
