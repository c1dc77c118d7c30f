from pathlib import Path
from types import SimpleNamespace

import pytest

from aeolian.domain.containers import ContainerSpec
from aeolian.domain.errors import FailedPrecondition
from aeolian.worker.hooks.base import Start
from aeolian.worker.hooks.network import NetworkHook


class SomeNetworks:
    resolver_file = "nameserver 192.0.2.53\n"

    def __init__(self, *, is_open: bool = True):
        self.is_open = is_open
        self.calls: list[tuple] = []

    async def take(self, task_id, *, is_blocked, cidrs):
        self.calls.append(("take", task_id, is_blocked, cidrs))
        return SimpleNamespace(namespace=SimpleNamespace(path=Path("/proc/1/fd/9")), hosts="192.0.2.1\tgateway\n")

    async def take_over(self, path, task_id, cidrs):
        self.calls.append(("take over", task_id, path))
        return SimpleNamespace(namespace=SimpleNamespace(path=path), hosts="")

    async def give_back(self, task_id):
        self.calls.append(("give back", task_id))


def started(tmp_path: Path, **spec) -> Start:
    return Start(ContainerSpec("ta-1", "ap-1", "fu-1", "main", "im-1", **spec), tmp_path, tmp_path / "socket")


async def test_a_container_gets_a_network_a_resolver_and_the_gateways_name(tmp_path):
    networks, start = SomeNetworks(), started(tmp_path)
    hook = NetworkHook(networks)
    await hook.apply(start)
    assert start.network_namespace == Path("/proc/1/fd/9") and start.host_names == "192.0.2.1\tgateway\n"
    assert start.resolver.read_text() == networks.resolver_file
    await hook.undo(start)
    assert start.network_namespace is None and networks.calls[-1] == ("give back", "ta-1")


async def test_a_closed_one_has_no_resolver(tmp_path):
    networks, start = SomeNetworks(), started(tmp_path, block_network=True)
    await NetworkHook(networks).apply(start)
    assert start.resolver is None and networks.calls == [("take", "ta-1", True, None)]


async def test_the_network_of_a_standby_goes_over_to_the_container_that_it_becomes(tmp_path):
    networks, start = SomeNetworks(), started(tmp_path)
    start.network_namespace = Path("/proc/1/fd/7")
    await NetworkHook(networks).apply(start)
    assert networks.calls == [("take over", "ta-1", Path("/proc/1/fd/7"))]


async def test_who_wants_none_shares_the_hosts(tmp_path):
    networks, start = SomeNetworks(), started(tmp_path)
    await NetworkHook(networks, lambda spec: spec.is_server).apply(start)
    assert start.network_namespace is None and not networks.calls


async def test_where_there_are_none_a_list_of_allowed_networks_cannot_be_kept(tmp_path):
    hook = NetworkHook(SomeNetworks(is_open=False))
    start = started(tmp_path)
    await hook.apply(start)
    assert start.network_namespace is None
    with pytest.raises(FailedPrecondition, match="doctor"):
        await hook.apply(started(tmp_path, allowed_cidrs=()))
