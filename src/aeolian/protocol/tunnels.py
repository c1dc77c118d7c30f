"""RPCs about tunnels: containers ask for public ports that lead to their own."""

from modal_proto import api_pb2

from aeolian.control.tunnels import Tunnels
from aeolian.domain.caller import Caller
from aeolian.domain.errors import PermissionDenied, Unimplemented


class TunnelRpcs:
    def __init__(self, tunnels: Tunnels, host: str, *, has_certificate: bool):
        """`host`: at which public ports are reached."""
        self._tunnels = tunnels
        self._host = host
        self._has_certificate = has_certificate

    async def TunnelStart(self, request: api_pb2.TunnelStartRequest, caller: Caller) -> api_pb2.TunnelStartResponse:
        if request.tunnel_type == api_pb2.TUNNEL_TYPE_H2 and self._has_certificate:
            raise Unimplemented("tunnels that end TLS do not speak HTTP/2 yet: forward the port without h2_enabled")
        tunnel = await self._tunnels.start(_container(caller), request.port, unencrypted=request.unencrypted)
        response = api_pb2.TunnelStartResponse(host=self._host, port=tunnel.tls_port)
        if tunnel.plain_port:
            response.unencrypted_host, response.unencrypted_port = self._host, tunnel.plain_port
        return response

    async def TunnelStop(self, request: api_pb2.TunnelStopRequest, caller: Caller) -> api_pb2.TunnelStopResponse:
        return api_pb2.TunnelStopResponse(exists=await self._tunnels.stop(_container(caller), request.port))


def _container(caller: Caller) -> str:
    if not caller.is_container:
        raise PermissionDenied("only a container can forward its ports")
    return caller.task_id
