"""Who is calling: a client with a token, or a container that its worker vouches for."""

import hashlib
from collections.abc import Mapping

import msgspec

from aeolian.domain.roles import Role

MAX_KEY_LENGTH = 100


class Caller(msgspec.Struct, frozen=True):
    """The authenticated side of a request.

    A client (`token_id` set) acts for its workspace. A container (`task_id` set) acts for itself: its app,
    function and environment come from its specification, never from the request.
    """

    workspace: str
    token_id: str = ""
    task_id: str = ""
    app_id: str = ""
    function_id: str = ""
    environment_name: str = ""
    environment_was: str = ""
    """Of a container: the name that its environment had when it started, which is the one it knows."""
    sdk_version: str = ""
    """Version of the Python SDK (`1.6.4`); "" for JS and Go, which all claim 1.0.0."""
    client_type: int = 1
    idempotency_key: str = ""
    worker_id: str = ""
    may_repeat: bool = True
    """This request may have been sent before: its sender says so, or does not say."""
    time_left_s: float | None = None
    """How long the caller still waits for the answer to this request; None: as long as it takes."""

    name: str = ""
    """Of the token; "" for a container."""
    roles: Mapping[str, Role] | None = None
    """By environment id: all that it may reach. None: everything."""
    is_restricted: bool = False
    """A container that may do nothing but its own work (`restrict_modal_access`)."""

    @property
    def who(self) -> str:
        """As others are told who deployed or stopped something."""
        return self.name or self.workspace

    @property
    def is_container(self) -> bool:
        return bool(self.task_id)

    def sees(self, environment_id: str) -> bool:
        """Whether it may look at what is in that environment. What it may do there is checked before (`protocol/guard`)."""
        return self.roles is None or self.roles.get(environment_id, Role.NO_ACCESS) >= Role.VIEWER

    def once(self, method: str) -> str | None:
        """The key under which this request's result is kept (`Database.write(once=…)`), or None."""
        if not self.idempotency_key:
            return None
        key = self.idempotency_key
        if len(key) > MAX_KEY_LENGTH:  # a client's own invention: a UUID has 36
            key = hashlib.sha256(key.encode()).hexdigest()
        return f"{method}/{self.token_id or self.task_id}/{key}"
