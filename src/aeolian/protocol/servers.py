"""RPCs about servers and their URLs: tokens to reach them, and the containers that serve."""

from urllib.parse import urlsplit

from modal_proto import api_pb2

from aeolian.control.access import Access
from aeolian.control.functions import Functions
from aeolian.control.pools import Pools
from aeolian.control.url_tokens import UrlTokens
from aeolian.control.web_urls import WebUrls
from aeolian.domain.caller import Caller
from aeolian.domain.containers import ContainerState
from aeolian.domain.errors import NotFound
from aeolian.domain.roles import Right


class ServerRpcs:
    def __init__(
        self, functions: Functions, pools: Pools, web_urls: WebUrls, tokens: UrlTokens, access: Access, host: str
    ):
        """`host`: of web functions without a domain. Tokens are for nobody else."""
        self._functions = functions
        self._pools = pools
        self._web_urls = web_urls
        self._tokens = tokens
        self._access = access
        self._host = host

    async def FunctionGetFlashAuthToken(
        self, request: api_pb2.FunctionGetFlashAuthTokenRequest, caller: Caller
    ) -> api_pb2.FunctionGetFlashAuthTokenResponse:
        self._functions.check_callable(request.function_id, caller)
        return api_pb2.FunctionGetFlashAuthTokenResponse(token=self._tokens.make(request.function_id))

    async def CurlGetAuthToken(
        self, request: api_pb2.CurlAuthTokenRequest, caller: Caller
    ) -> api_pb2.CurlAuthTokenResponse:
        """`modal curl`: empty for what is no web function of this Aeolian, which then gets no token."""
        try:
            parts = urlsplit(request.url if "//" in request.url else f"//{request.url}")
            port = parts.port
        except ValueError:
            return api_pb2.CurlAuthTokenResponse()
        host = parts.hostname or ""
        target = self._web_urls.at_host(host)
        if target is None and port and host in (self._host, "localhost"):
            target = self._web_urls.at_port(port)
        if target is None:
            return api_pb2.CurlAuthTokenResponse()
        try:
            self._functions.check_callable(target.function_id, caller)
        except NotFound:
            return api_pb2.CurlAuthTokenResponse()
        if caller.roles is not None and (home := await self._access.home_of(target.function_id, caller)) is not None:
            self._access.check(caller, Right.WRITE, [home])
        return api_pb2.CurlAuthTokenResponse(token=self._tokens.make(target.function_id))

    async def FlashContainerList(
        self, request: api_pb2.FlashContainerListRequest, caller: Caller
    ) -> api_pb2.FlashContainerListResponse:
        self._functions.check_callable(request.function_id, caller)
        settings = self._functions.pool_settings(request.function_id)
        response = api_pb2.FlashContainerListResponse()
        pool = self._pools.get(request.function_id)
        for container in pool.containers.values() if pool is not None else ():
            if settings.is_server and container.state is ContainerState.RUNNING:
                response.containers.add(task_id=container.task_id, host=container.task_id, port=settings.server_port)
        return response
