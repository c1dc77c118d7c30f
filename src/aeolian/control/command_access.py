"""Who may run commands in a container: a short-lived JWT for one container, which the client shows with each request."""

import base64
import hashlib
import hmac

import msgspec

from aeolian.domain.clock import Clock
from aeolian.domain.errors import Unauthenticated

LIFETIME_S = 600.0
"""Clients fetch a new one when it is over. A command that runs, and a stream that is open, go on."""
HEADER = b'{"alg":"HS256","typ":"JWT"}'
REMEDY = "`modal container exec` asks for a new one by itself"


class Access(msgspec.Struct, frozen=True):
    """What a JWT says."""

    task_id: str
    workspace: str
    token_id: str
    exp: int


class CommandAccess:
    def __init__(self, key: bytes, clock: Clock):
        self._key = key
        self._clock = clock

    def give(self, task_id: str, workspace: str, token_id: str) -> str:
        access = Access(task_id, workspace, token_id, int(self._clock.now() + LIFETIME_S))
        body = f"{_b64(HEADER)}.{_b64(msgspec.json.encode(access))}"
        return f"{body}.{self._signature(body)}"

    def check(self, jwt: str) -> Access:
        """Raises Unauthenticated unless it was given out by this server, and not long ago."""
        body, _, signature = jwt.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(body).encode()):
            raise Unauthenticated(f"this is no permission for commands in a container of this server: {REMEDY}")
        payload = body.partition(".")[2]
        access = msgspec.json.decode(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)), type=Access)
        if access.exp <= self._clock.now():
            raise Unauthenticated(f"the permission for commands in {access.task_id} has expired: {REMEDY}")
        return access

    def _signature(self, body: str) -> str:
        return _b64(hmac.digest(self._key, b"commands\0" + body.encode(), hashlib.sha256))


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
