"""Networks of their own for containers, where this host can give them."""

import asyncio
import contextlib
import errno
import socket
import subprocess
from pathlib import Path

import pytest

from aeolian.domain.errors import InvalidArgument, Unavailable
from aeolian.worker.networks import bridge as bridges
from aeolian.worker.networks.namespace import Namespace
from aeolian.worker.networks.networks import Networks, Offered

pytestmark = pytest.mark.skipif(bool(bridges.problem_here()), reason=bridges.problem_here())
GATEWAY_PORT = 9901


@pytest.fixture
async def networks(tmp_path: Path):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"gateway")
        writer.close()

    gateway = tmp_path / "http.sock"
    made = Networks(tmp_path, Offered("127.0.0.1", GATEWAY_PORT, gateway))
    try:
        await made.open()
    except Unavailable as error:
        pytest.skip(error.message)
    async with await asyncio.start_unix_server(answer, gateway):
        yield made
        await made.close()
    async with asyncio.timeout(10):  # the kernel ends namespaces behind the scenes
        while await asyncio.to_thread(is_left, made.name):  # noqa: ASYNC110 - it tells nobody when it has
            await asyncio.sleep(0.02)


def is_left(name: str) -> bool:
    commands = ["ip", "link"], ["nft", "list", "tables"]
    return any(name in subprocess.run(command, capture_output=True, text=True).stdout for command in commands)


async def take(networks: Networks, task_id: str, *, is_blocked: bool = False, cidrs=None) -> Namespace:
    return (await networks.take(task_id, is_blocked=is_blocked, cidrs=cidrs)).namespace


async def tried(namespace: Namespace, host: str, port: int) -> str:
    """What connecting from inside comes to."""
    with namespace.socket() as sock:
        try:
            async with asyncio.timeout(2):
                await asyncio.get_running_loop().sock_connect(sock, (host, port))
        except OSError as error:
            return errno.errorcode[error.errno or 0] if error.errno else "TIMEOUT"
        return "connected"


@contextlib.contextmanager
def listening(namespace: Namespace | None, host: str = "0.0.0.0"):
    """On a free port inside; None: on the host. Yields the port."""
    with namespace.entered() if namespace is not None else contextlib.nullcontext():
        sock = socket.create_server((host, 0))
    with sock:
        yield sock.getsockname()[1]


async def test_containers_reach_neither_one_another_nor_the_host(networks):
    one, other = await take(networks, "ta-1"), await take(networks, "ta-2")
    with listening(other) as port:
        assert await tried(other, other.address, port) == "connected"
        assert await tried(one, other.address, port) != "connected"
    bridge = one.address.rsplit(".", 1)[0] + ".1"
    with listening(None) as port:
        for host in ("127.0.0.1", bridge, "169.254.169.254"):
            assert await tried(one, host, port) != "connected", host


async def test_the_gateway_is_reached_at_its_own_address_from_every_network(networks):
    for task_id, is_blocked, cidrs in (("ta-1", False, None), ("ta-2", True, None), ("ta-3", False, ["192.0.2.0/24"])):
        namespace = await take(networks, task_id, is_blocked=is_blocked, cidrs=cidrs)
        with namespace.socket() as sock:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", GATEWAY_PORT))
            assert await loop.sock_recv(sock, 100) == b"gateway"


async def test_a_blocked_network_has_no_way_out(networks):
    namespace = await take(networks, "ta-1", is_blocked=True)
    assert namespace.address == ""
    assert await tried(namespace, "192.0.2.1", 80) == "ENETUNREACH"


async def test_an_allow_list_lets_nothing_else_through(networks):
    namespace = await take(networks, "ta-1", cidrs=["198.51.100.0/24"])
    assert await tried(namespace, "203.0.113.1", 80) in ("EACCES", "EHOSTUNREACH", "EPERM")
    with listening(namespace) as port:
        assert await tried(namespace, "127.0.0.1", port) == "connected"
    with pytest.raises(InvalidArgument, match="no-network"):
        await networks.take("ta-2", is_blocked=False, cidrs=["no-network"])


async def test_a_network_that_was_prepared_for_somebody_goes_over_to_a_container(networks):
    prepared = await take(networks, "standby-1")
    taken = await networks.take_over(prepared.path, "ta-1", ["198.51.100.0/24"])
    assert taken.namespace is prepared
    await networks.give_back("standby-1")
    with listening(prepared) as port:
        (await networks.connect("ta-1", port)).close()
    assert await tried(prepared, "203.0.113.1", 80) != "connected"
    with pytest.raises(Unavailable, match="gone"):
        await networks.take_over(Path("/proc/1/fd/99"), "ta-2", None)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("is_blocked", [False, True])
async def test_the_worker_reaches_what_listens_in_a_container(networks, host, is_blocked):
    namespace = await take(networks, "ta-1", is_blocked=is_blocked)
    with listening(namespace, host) as port:
        (await networks.connect("ta-1", port)).close()
    with pytest.raises(OSError):
        await networks.connect("ta-1", port)
    assert await networks.connect("ta-2", port) is None, "a container that shares the host's network"


async def test_a_server_that_listens_on_eth0_alone_is_reached_too(networks):
    namespace = await take(networks, "ta-1")
    with listening(namespace, namespace.address) as port:
        (await networks.connect("ta-1", port)).close()


async def test_many_containers_get_networks_at_once_and_addresses_are_used_again(networks):
    taken = await asyncio.gather(*(take(networks, f"ta-{number}") for number in range(20)))
    assert len({namespace.address for namespace in taken}) == 20
    num_free = len(networks._free)
    await asyncio.gather(*(networks.give_back(f"ta-{number}") for number in range(20)))
    assert len(networks._free) >= num_free + 15


async def test_a_worker_that_starts_again_replaces_what_a_killed_one_left(networks, tmp_path):
    await take(networks, "ta-1")
    again = Networks(tmp_path, Offered("127.0.0.1", GATEWAY_PORT, tmp_path / "http.sock"))
    await again.open()
    namespace = await take(again, "ta-2")
    assert namespace.address
    await again.close()
