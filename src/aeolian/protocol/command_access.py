"""The RPC by which clients learn where and with what permission to run commands in a container."""

from urllib.parse import urlsplit

from modal_proto import api_pb2

from aeolian.control.command_access import CommandAccess
from aeolian.control.containers import Containers
from aeolian.domain.caller import Caller
from aeolian.domain.errors import FailedPrecondition, PermissionDenied

LIBMODAL_TYPES = (
    api_pb2.CLIENT_TYPE_LIBMODAL,
    api_pb2.CLIENT_TYPE_LIBMODAL_JS,
    api_pb2.CLIENT_TYPE_LIBMODAL_GO,
)

WITHOUT_HTTP = ("1.0.", "1.1.", "1.2.", "1.3.", "1.4.")


class CommandAccessRpcs:
    def __init__(self, containers: Containers, access: CommandAccess, grpc_url: str):
        """`grpc_url`: the router is served where all other RPCs are."""
        self._containers = containers
        self._access = access
        self._grpc_url = grpc_url

    async def TaskGetCommandRouterAccess(
        self, request: api_pb2.TaskGetCommandRouterAccessRequest, caller: Caller
    ) -> api_pb2.TaskGetCommandRouterAccessResponse:
        if caller.is_container:
            raise PermissionDenied("a container may not run commands in containers")
        container = self._containers.find(request.task_id, caller)
        jwt = self._access.give(container.task_id, caller.workspace, caller.token_id)
        return api_pb2.TaskGetCommandRouterAccessResponse(url=self._url(caller), jwt=jwt)

    def _url(self, caller: Caller) -> str:
        """The JavaScript and Go clients insist on https, and speak plain HTTP/2 to localhost all the same.

        Raises FailedPrecondition for old Python clients, which never do.
        """
        address = urlsplit(self._grpc_url)
        if address.scheme != "http":
            return self._grpc_url
        if caller.client_type in LIBMODAL_TYPES:
            return f"https://{address.netloc}"
        if caller.sdk_version.startswith(WITHOUT_HTTP):
            raise FailedPrecondition(
                f"modal {caller.sdk_version} runs commands in containers only over TLS: use modal 1.5 or newer, or start "
                "Aeolian with --tls-certificate and --tls-key"
            )
        return self._grpc_url
