"""The start hook of networks: a namespace of its own for each container, closed in where that was asked for."""

from collections.abc import Callable

from aeolian.domain.containers import ContainerSpec
from aeolian.domain.errors import FailedPrecondition
from aeolian.worker.hooks.base import Start
from aeolian.worker.networks.networks import Networks


class NetworkHook:
    """`wants`: which containers get one; the others share the host's."""

    name = "network"

    def __init__(self, networks: Networks, wants: Callable[[ContainerSpec], bool] = lambda spec: True):
        self._networks = networks
        self._wants = wants

    async def apply(self, start: Start) -> None:
        spec = start.spec
        if not self._networks.is_open:
            if spec.allowed_cidrs is not None:
                raise FailedPrecondition(
                    "this container may only connect to some networks, and this host cannot keep it to them: "
                    "`aeolian doctor` says what is missing"
                )
            return
        if not self._wants(spec):
            return
        if start.network_namespace is not None:  # that of the standby which becomes this container
            network = await self._networks.take_over(start.network_namespace, spec.task_id, spec.allowed_cidrs)
        else:
            network = await self._networks.take(spec.task_id, is_blocked=spec.block_network, cidrs=spec.allowed_cidrs)
        start.network_namespace = network.namespace.path
        start.host_names = network.hosts
        if not spec.block_network:
            resolver = start.folder / "resolv.conf"
            resolver.write_text(self._networks.resolver_file)
            start.resolver = resolver

    async def undo(self, start: Start) -> None:
        start.network_namespace = None
        await self._networks.give_back(start.spec.task_id)
