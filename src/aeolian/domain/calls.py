"""Function calls: their inputs, their outputs, and what became of each. Numbers are those of Modal's protocol.

::

    Input    QUEUED --assigned--> RUNNING --output--> finished (has exactly one Output)
                ^                    |
                +--container lost----+      (same retry count: not the user's fault)
                +--retry (SYNC: by the client; ASYNC: by the server)-- finished with a failure
"""

import base64
import hashlib
import hmac
from enum import IntEnum
from typing import NamedTuple

import msgspec

from aeolian.domain.errors import InvalidArgument, NotFound

MAX_LOSSES = 8
"""How often an input may lose its container to outside forces before it fails."""
MAX_CRASHES = 3
"""How often the containers of an input may end by themselves before it fails."""


class CallType(IntEnum):
    UNARY = 1
    MAP = 2


class Invocation(IntEnum):
    SYNC_LEGACY = 1
    """Somebody waits (generators, and SDKs that do not retry)."""
    ASYNC_LEGACY = 2
    ASYNC = 3
    """`.spawn`: outputs are kept for days, the server retries."""
    SYNC = 4
    """Somebody waits, and that client retries by itself."""

    @property
    def is_async(self) -> bool:
        return self in (Invocation.ASYNC, Invocation.ASYNC_LEGACY)


class Status(IntEnum):
    """`GenericResult.GenericStatus`; 0: not finished."""

    PENDING = 0
    SUCCESS = 1
    FAILURE = 2
    TERMINATED = 3
    TIMEOUT = 4
    INIT_FAILURE = 5
    INTERNAL_FAILURE = 6
    OOM_KILL = 10


RETRIED = frozenset({Status.FAILURE, Status.TIMEOUT, Status.INIT_FAILURE, Status.OOM_KILL})
"""What a user's retry policy applies to."""


class InputKey(NamedTuple):
    """An input within its call. Its id says both, so that no table of ids is needed."""

    call_id: str
    idx: int

    @property
    def input_id(self) -> str:
        return f"in-{self.call_id[3:]}:{self.idx}"


def key_of(input_id: str) -> InputKey:
    """Raises NotFound for what cannot be an input."""
    call, colon, idx = input_id[3:].rpartition(":")
    if not input_id.startswith("in-") or not colon or not idx.isdecimal():
        raise NotFound(f"there is no input {input_id!r}")
    return InputKey(f"fc-{call}", int(idx))


class Tickets:
    """What clients hand back to name a call or an input: three parts like a JWT, as short as can be.

    The SDK decodes the payload of an input's ticket (`idx`) and sends all outstanding ones with each poll.
    """

    def __init__(self, key: bytes):
        self._key = key

    def of_call(self, call_id: str) -> str:
        return f"e30.{_b64(call_id.encode())}.{self._mac(call_id)}"

    def of_input(self, call_id: str, idx: int) -> str:
        payload = _b64(b'{"idx":%d}' % idx)
        return f"e30.{payload}.{self._mac(f'{call_id}:{idx}')}"

    def read_call(self, ticket: str) -> str:
        call_id = _payload(ticket).decode(errors="replace")
        self._check(ticket, call_id)
        return call_id

    def read_input(self, call_id: str, ticket: str) -> int:
        try:
            idx = msgspec.json.decode(_payload(ticket), type=_InputPayload).idx
        except msgspec.MsgspecError:
            raise InvalidArgument(f"the input ticket {ticket[:60]!r} is malformed") from None
        self._check(ticket, f"{call_id}:{idx}")
        return idx

    def _mac(self, text: str) -> str:
        return _b64(hmac.digest(self._key, text.encode(), hashlib.sha256)[:6])

    def _check(self, ticket: str, text: str) -> None:
        if not hmac.compare_digest(ticket.rpartition(".")[2], self._mac(text)):
            raise InvalidArgument(f"the ticket {ticket[:60]!r} was not made by this server")


class _InputPayload(msgspec.Struct):
    idx: int


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _payload(ticket: str) -> bytes:
    parts = ticket.split(".")
    if len(parts) != 3:
        raise InvalidArgument(f"the ticket {ticket[:60]!r} is malformed")
    try:
        return base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
    except ValueError:
        raise InvalidArgument(f"the ticket {ticket[:60]!r} is malformed") from None
