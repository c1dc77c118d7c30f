"""Tokens for one web function or server: what `modal curl` sends instead of proxy tokens.

Three parts like a JWT, because clients read when it expires.
"""

import hashlib
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode

import msgspec

from aeolian.domain.clock import Clock

LIFETIME_S = 300.0


class _Payload(msgspec.Struct, frozen=True):
    fn: str
    exp: int


class UrlTokens:
    def __init__(self, key: bytes, clock: Clock):
        self._key = key
        self._clock = clock

    def make(self, function_id: str) -> str:
        payload = _b64(msgspec.json.encode(_Payload(function_id, int(self._clock.now() + LIFETIME_S))))
        return f"e30.{payload}.{self._mac(payload)}"

    def allows(self, token: str, function_id: str) -> bool:
        """Whether it was made for this Function, and is still valid."""
        head, _, rest = token.partition(".")
        payload, _, mac = rest.partition(".")
        if head != "e30" or not hmac.compare_digest(mac.encode(), self._mac(payload).encode()):
            return False
        read = msgspec.json.decode(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)), type=_Payload)
        return read.fn == function_id and read.exp > self._clock.now()

    def _mac(self, payload: str) -> str:
        return _b64(hmac.new(self._key, payload.encode(), hashlib.sha256).digest())


def _b64(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()
