"""`/metrics` for Prometheus, and how long HTTP requests take.

Who scrapes shows a client token by HTTP's basic authentication: its id as the name, its secret as the password
(`basic_auth` in a scrape configuration of Prometheus).
"""

import base64
import binascii
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from aeolian.control.metrics import CONTENT_TYPE, Metrics
from aeolian.domain.caller import Caller
from aeolian.domain.errors import AeolianError, Unauthenticated
from aeolian.gateway.errors import error_response, status_of

Authenticate = Callable[[dict[str, Any]], Awaitable[Caller]]
CHALLENGE = {"WWW-Authenticate": 'Basic realm="Aeolian", charset="UTF-8"'}
UNKNOWN_ROUTE = "(unknown)"
ROUTE = "aeolian.route"
"""Key of a request under which a middleware says what it was for, where no route does."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class MetricRoutes:
    def __init__(self, metrics: Metrics, authenticate: Authenticate):
        self._metrics = metrics
        self._authenticate = authenticate

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/metrics", self.show)]

    async def show(self, request: web.Request) -> web.Response:
        try:
            await self._authenticate(_token_of(request.headers.get("Authorization", "")))
        except Unauthenticated as error:
            response = error_response(401, error.message)
            response.headers.update(CHALLENGE)
            return response
        headers = {"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"}
        return web.Response(body=self._metrics.text(), headers=headers)


def measure(metrics: Metrics):
    """A middleware that times each request by the pattern of its route: as many series as there are routes."""

    @web.middleware
    async def measured(request: web.Request, handler: Handler) -> web.StreamResponse:
        began_at, status = time.perf_counter(), 500
        try:
            response = await handler(request)
            status = response.status
            return response
        except AeolianError as error:
            status = status_of(error)
            raise
        except web.HTTPException as error:
            status = error.status
            raise
        finally:
            resource = request.match_info.route.resource
            route = request.get(ROUTE) or (resource.canonical if resource is not None else UNKNOWN_ROUTE)
            method = request.method if request.method in METHODS else "other"
            metrics.request_answered(method, route, status, time.perf_counter() - began_at)

    return measured


def _token_of(authorization: str) -> dict[str, str]:
    """Raises Unauthenticated for what is no basic authentication."""
    scheme, _, encoded = authorization.partition(" ")
    try:
        if scheme.lower() != "basic":
            raise ValueError
        token_id, colon, secret = base64.b64decode(encoded, validate=True).decode().partition(":")
        if not colon:
            raise ValueError
    except (binascii.Error, ValueError):
        raise Unauthenticated(
            "metrics are for those who have a token: give its id and its secret as the name and the password of HTTP's "
            "basic authentication"
        ) from None
    return {"x-modal-token-id": token_id, "x-modal-token-secret": secret}
