"""Who may reach what is not open to everybody: by a proxy token, or by the token that `modal curl` gets for one URL.

Tokens are for the ingress: what they guard never sees them.
"""

from aiohttp import web

from aeolian.control.proxy_tokens import ProxyTokens
from aeolian.control.url_tokens import UrlTokens
from aeolian.control.web_urls import WebTarget
from aeolian.domain.ids import PREFIXES
from aeolian.gateway.ingress import plain

BEARER = "bearer "
CREDENTIALS = frozenset({"modal-authorization", "modal-key", "modal-secret"})


class ProxyAuth:
    def __init__(self, proxy_tokens: ProxyTokens, url_tokens: UrlTokens):
        self._proxy_tokens = proxy_tokens
        self._url_tokens = url_tokens

    async def may_enter(self, request: web.Request, target: WebTarget) -> bool:
        """`Modal-Key` and `Modal-Secret`, or `Authorization: Bearer wk-….ws-…`, or `Modal-Authorization: Bearer …`."""
        headers = request.headers
        key, secret = headers.get("Modal-Key", ""), headers.get("Modal-Secret", "")
        if not key:
            key, _, secret = _bearer(headers.get("Authorization", "")).partition(".")
        if key and self._proxy_tokens.allows(key, secret, target.workspace, target.environment_id):
            return True
        token = _bearer(headers.get("Modal-Authorization", ""))
        return bool(token) and self._url_tokens.allows(token, target.function_id)


def credentials_in(request: web.Request) -> frozenset[str]:
    """The headers that were looked at. `Authorization` is the app's own matter, unless it holds a proxy token."""
    is_ours = _bearer(request.headers.get("Authorization", "")).startswith(f"{PREFIXES['proxy_token']}-")
    return CREDENTIALS | {"authorization"} if is_ours else CREDENTIALS


def refusal(what: str) -> web.Response:
    """`what` it is that is not open: `web function` or `server`."""
    return plain(
        401,
        f"this {what} is not open to everybody: send the headers Modal-Key and Modal-Secret of a proxy token, "
        "which `modal workspace proxy-tokens create` makes",
    )


def _bearer(header: str) -> str:
    return header[len(BEARER) :].strip() if header[: len(BEARER)].lower() == BEARER else ""
