import asyncio
from types import SimpleNamespace

import pytest

from aeolian.domain.containers import ContainerSpec
from aeolian.worker.server_life import ServerLife


class SomePorts:
    """Of a container: accepts and drains when a test says so."""

    def __init__(self):
        self.accepts, self.is_drained = asyncio.Event(), asyncio.Event()
        self.probed: list[tuple[str, int]] = []

    async def until_accepting(self, task_id: str, port: int) -> None:
        self.probed.append((task_id, port))
        await self.accepts.wait()

    async def until_drained(self, task_id: str) -> None:
        await self.is_drained.wait()


@pytest.fixture
async def place():
    spec = ContainerSpec("ta-1", "ap-1", "fu-1", "main", "im-1", is_server=True, server_port=8000)
    said: list[str] = []
    ports = SomePorts()
    life = ServerLife(spec, ports, lambda: said.append("ready"), lambda: said.append("drained"))
    yield SimpleNamespace(life=life, ports=ports, said=said)
    life.close()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_it_is_ready_when_its_hooks_have_run_and_its_port_accepts(place):
    place.ports.accepts.set()
    await settle()
    assert place.said == []
    for _ in range(2):  # the SDK repeats what it is not sure of
        assert await place.life.ContainerServerLifecycleReady(b"", "key") == b""
    await settle()
    assert place.said == ["ready"] and place.ports.probed == [("ta-1", 8000)]


async def test_it_ends_when_its_last_request_has(place):
    place.life.drain(1000)
    place.life.drain(0)
    await settle()
    assert place.said == []
    place.ports.is_drained.set()
    await settle()
    assert place.said == ["drained"]


async def test_requests_that_take_longer_than_they_may_are_cut_off(place):
    place.life.drain(0)
    async with asyncio.timeout(5):
        while not place.said:  # noqa: ASYNC110 - that it says so is what is waited for
            await asyncio.sleep(0.001)
    assert place.said == ["drained"]


async def test_a_container_that_is_gone_is_probed_no_more(place):
    await place.life.ContainerServerLifecycleReady(b"", "key")
    await settle()
    place.life.close()
    place.ports.accepts.set()
    await settle()
    assert place.said == []
