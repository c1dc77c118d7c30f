from types import SimpleNamespace

import pytest
from some_cluster import InlineDatabase

from aeolian.control.tunnels import MAX_PER_CONTAINER, Tunnels
from aeolian.domain.errors import AlreadyExists, InvalidArgument, ResourceExhausted


class SomePorts:
    """Of a front: what is open, and whether TLS ends there."""

    def __init__(self):
        self.open_ports: dict[int, bool] = {}
        self.taken: set[int] = set()

    def open(self, port: int, *, has_tls: bool) -> int | None:
        if port in self.taken:
            return None
        port = port or 20_000 + len(self.open_ports) + 1
        self.open_ports[port] = has_tls
        return port

    def close(self, port: int) -> None:
        del self.open_ports[port]


@pytest.fixture
def ports():
    return SomePorts()


@pytest.fixture
def database():
    return InlineDatabase()


@pytest.fixture
def tunnels(ports, database):
    return Tunnels(database, ports, has_certificate=True)


def ended(task_id: str):
    return SimpleNamespace(task_id=task_id)


async def test_a_tunnel_leads_to_a_port_of_its_container_until_it_is_stopped(tunnels, ports):
    tunnel = await tunnels.start("ta-1", 80, unencrypted=False)
    assert tunnels.at(tunnel.tls_port) == tunnel and tunnel.plain_port == 0
    assert ports.open_ports == {tunnel.tls_port: True}
    assert not await tunnels.stop("ta-2", 80), "another container's"
    assert await tunnels.stop("ta-1", 80) and not await tunnels.stop("ta-1", 80)
    assert tunnels.at(tunnel.tls_port) is None and not ports.open_ports


async def test_an_unencrypted_tunnel_has_a_second_port_where_the_first_one_ends_tls(tunnels, ports, database):
    tunnel = await tunnels.start("ta-1", 80, unencrypted=True)
    assert ports.open_ports == {tunnel.tls_port: True, tunnel.plain_port: False}
    without = await Tunnels(database, ports, has_certificate=False).start("ta-2", 80, unencrypted=True)
    assert without.plain_port == without.tls_port


async def test_tunnels_end_with_their_container(tunnels, ports, database):
    await tunnels.start("ta-1", 80, unencrypted=True)
    kept = await tunnels.start("ta-2", 80, unencrypted=False)
    tunnels.container_ended(ended("ta-1"))
    await tunnels.close()
    assert set(ports.open_ports) == {kept.tls_port}
    again = Tunnels(database, SomePorts(), has_certificate=True)
    await again.load()
    assert again.at(kept.tls_port) == kept


async def test_after_a_restart_tunnels_are_where_they_were_if_their_containers_are(tunnels, database):
    first = await tunnels.start("ta-1", 80, unencrypted=True)
    second = await tunnels.start("ta-2", 80, unencrypted=False)
    third = await tunnels.start("ta-3", 80, unencrypted=False)
    ports = SomePorts()
    ports.taken = {third.tls_port}
    again = Tunnels(database, ports, has_certificate=True)
    await again.load()
    await again.drop_unknown(lambda task_id: task_id != "ta-2")
    assert set(ports.open_ports) == {first.tls_port, first.plain_port}
    assert again.at(first.plain_port) == first and again.at(second.tls_port) is None
    assert again.at(third.tls_port) is None


async def test_what_makes_no_sense_is_refused(tunnels):
    await tunnels.start("ta-1", 80, unencrypted=False)
    with pytest.raises(AlreadyExists, match="80"):
        await tunnels.start("ta-1", 80, unencrypted=True)
    for port in (0, -1, 65_536):
        with pytest.raises(InvalidArgument):
            await tunnels.start("ta-1", port, unencrypted=False)
    for number in range(1, MAX_PER_CONTAINER):
        await tunnels.start("ta-1", 1000 + number, unencrypted=False)
    with pytest.raises(ResourceExhausted):
        await tunnels.start("ta-1", 99, unencrypted=False)
    await tunnels.start("ta-2", 99, unencrypted=False)
