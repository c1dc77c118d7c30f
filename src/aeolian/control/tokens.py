"""Client tokens: who may use this server, and what for. Only hashes of their secrets are kept.

A service user is a token for a program: it has a name that nobody else has, and begins without any role.
"""

import base64
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy.engine import Connection

from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unauthenticated
from aeolian.domain.ids import content_id, new_id
from aeolian.domain.roles import Role
from aeolian.storage import environments as environment_storage
from aeolian.storage import tokens as storage
from aeolian.storage.database import Database
from aeolian.storage.tokens import Token

AUTH_TOKEN_LIFETIME_S = 20 * 60
USED_EVERY_S = 60.0
"""How exactly it is recorded when a token was used last."""
RECHECK_S = 2.0
"""How long a token that was right is believed: `aeolian token` may have disabled or deleted it meanwhile."""
SERVICE_USER_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
PYTHON_CLIENT_TYPES = ("1", "3", "7")
REMEDY = "`aeolian connect --data-dir …` writes a working profile, `aeolian token list` shows the tokens there are"


class Tokens:
    def __init__(self, database: Database, clock: Clock, key: bytes):
        """`key` signs the short-lived tokens of `auth_token`."""
        self._database = database
        self._clock = clock
        self._key = key
        self._checked: dict[tuple[str, str], tuple[Token, float]] = {}
        """Tokens by their id and secret, and when they were last found to be right."""
        self._used_at: dict[str, float] = {}

    async def create(
        self,
        name: str,
        workspace: str,
        *,
        expires_at: float = 0.0,
        roles: Mapping[str, Role] | None = None,
        created_by: str = "",
    ) -> tuple[str, str]:
        """A new token: (id, secret). The secret is not kept. Without `roles` it manages everything."""
        token_id, secret = new_id("token"), new_id("token_secret")
        token = Token(
            token_id=token_id,
            secret_hash=hash_of(secret),
            name=name,
            workspace=workspace,
            is_disabled=False,
            created_at=self._clock.now(),
            expires_at=expires_at,
            is_limited=roles is not None,
            created_by=created_by,
            roles=dict(roles or {}),
        )
        await self._database.write(lambda c: _insert(c, token))
        return token_id, secret

    async def create_service_user(
        self, name: str, workspace: str, *, expires_at: float = 0.0, created_by: str = "", once: str | None = None
    ) -> tuple[str, str, str]:
        """A new service user, without any role: (its id, token id, secret).

        `once` names the request: a repetition gets the same, although the secret is kept nowhere. Raises
        InvalidArgument, AlreadyExists.
        """
        if not SERVICE_USER_NAME.fullmatch(name):
            raise InvalidArgument(
                f"{name!r} cannot be the name of a service user: use 1 to 64 letters, digits, dashes and underscores"
            )
        seed = hmac.digest(self._key, once.encode(), "sha256") if once else secrets.token_bytes(32)
        user_id, token_id, secret = (
            content_id(noun, seed + noun.encode()) for noun in ("service_user", "token", "token_secret")
        )
        token = Token(
            token_id=token_id,
            secret_hash=hash_of(secret),
            name=name,
            workspace=workspace,
            is_disabled=False,
            created_at=self._clock.now(),
            expires_at=expires_at,
            is_limited=True,
            service_user_id=user_id,
            created_by=created_by,
        )

        def insert(connection: Connection) -> None:
            if storage.get(connection, token_id) is not None:
                return
            if any(one.service_user_id and one.name == name for one in storage.all_tokens(connection)):
                raise AlreadyExists(f"a service user named '{name}' already exists")
            storage.insert(connection, token)

        await self._database.write(insert)
        return user_id, token_id, secret

    async def authenticate(self, metadata: dict[str, Any]) -> Caller:
        """Who sends this request. Raises Unauthenticated with what to do."""
        token_id = str(metadata.get("x-modal-token-id", ""))
        secret = str(metadata.get("x-modal-token-secret", ""))
        token, checked_at = self._checked.get((token_id, secret), (None, 0.0))
        if token is None or self._clock.monotonic() - checked_at > RECHECK_S:
            token = await self._check(token_id, secret)
        now = self._clock.now()
        if token.expires_at and now >= token.expires_at:
            raise Unauthenticated(f"the token {token_id} has expired: {REMEDY}")
        if now - self._used_at.get(token_id, 0.0) > USED_EVERY_S:
            self._used_at[token_id] = now
            await self._database.write(lambda c: storage.update(c, token_id, last_used_at=now))
        client_type = str(metadata.get("x-modal-client-type", "1"))
        return Caller(
            workspace=token.workspace,
            token_id=token_id,
            sdk_version=str(metadata.get("x-modal-client-version", "")) if client_type in PYTHON_CLIENT_TYPES else "",
            client_type=int(client_type) if client_type.isdecimal() else 1,
            idempotency_key=str(metadata.get("x-idempotency-key", "")),
            name=token.name,
            roles=token.roles if token.is_limited else None,
        )

    async def _check(self, token_id: str, secret: str) -> Token:
        if not token_id or not secret:
            raise Unauthenticated(f"this request carries no token: {REMEDY}")
        token = await self._database.read(lambda c: storage.get(c, token_id))
        if token is None or token.is_disabled:
            self._forget(token_id)
        given = hash_of(secret)
        if token is None or not hmac.compare_digest(given, token.secret_hash):
            raise Unauthenticated(
                f"the token {token_id[:40]!r} is not one of this server, or its secret is wrong: {REMEDY}"
            )
        if token.is_disabled:
            raise Unauthenticated(
                f"the token {token_id} is disabled: `aeolian token enable {token_id}`, or use another"
            )
        self._checked[token_id, secret] = token, self._clock.monotonic()
        return token

    async def all(self) -> list[Token]:
        return await self._database.read(storage.all_tokens)

    async def is_last(self, token_id: str) -> bool:
        """Whether no other one could manage everything."""
        now = self._clock.now()
        return not any(
            token.token_id != token_id
            and not token.is_limited
            and not token.is_disabled
            and not 0 < token.expires_at <= now
            for token in await self.all()
        )

    async def get(self, token_id: str) -> Token:
        token = await self._database.read(lambda c: storage.get(c, token_id))
        if token is None:
            raise NotFound(f"there is no token {token_id!r}")
        return token

    async def service_user(self, *, user_id: str = "", name: str = "") -> Token:
        """By its id or its name. Raises NotFound."""
        for token in await self.all():
            if token.service_user_id and (token.service_user_id == user_id if user_id else token.name == name):
                return token
        raise NotFound(f"there is no service user {user_id or name!r}: `modal workspace service-users list` shows them")

    async def delete_service_user(self, *, user_id: str, name: str, once: str | None) -> None:
        """By its id or its name. Raises NotFound."""

        def delete(connection: Connection) -> str:
            for token in storage.all_tokens(connection):
                if token.service_user_id and (token.service_user_id == user_id if user_id else token.name == name):
                    storage.delete(connection, token.token_id)
                    return token.token_id
            raise NotFound(f"there is no service user {user_id or name!r}")

        self._forget(await self._database.write(delete, once=once))

    async def set_role(self, token_id: str, environment_id: str, role: Role | None) -> None:
        """Of a token that has role settings; None takes the role away. Raises NotFound, FailedPrecondition."""

        def change(connection: Connection) -> None:
            token = storage.get(connection, token_id)
            if token is None:
                raise NotFound(f"there is no token {token_id!r}")
            if not token.is_limited:
                raise FailedPrecondition(
                    f"the token '{token.name}' ({token_id}) manages everything, and has no roles: "
                    f"`aeolian token limit {token_id}` takes that from it, or give out another one"
                )
            storage.set_role(connection, token_id, environment_id, role)
            _restrict(connection, environment_id, role)

        await self._database.write(change)
        self._forget(token_id)

    async def limit(self, token_id: str) -> None:
        """From now on it has the roles that it is given, and nothing else. Raises NotFound."""
        if not await self._database.write(lambda c: storage.update(c, token_id, is_limited=True)):
            raise NotFound(f"there is no token {token_id!r}")
        self._forget(token_id)

    async def environment_deleted(self, environment_id: str) -> None:
        """Nobody has a role in it any more."""
        await self._database.write(lambda c: storage.forget_environment(c, environment_id))

    async def set_disabled(self, token_id: str, is_disabled: bool) -> None:
        if not await self._database.write(lambda c: storage.update(c, token_id, is_disabled=is_disabled)):
            raise NotFound(f"there is no token {token_id!r}")
        self._forget(token_id)

    async def delete(self, token_id: str, *, once: str | None = None) -> None:
        """`once` names the request (`Database.write`)."""
        if not await self._database.write(lambda c: storage.delete(c, token_id), once=once):
            raise NotFound(f"there is no token {token_id!r}")
        self._forget(token_id)

    def auth_token(self, caller: Caller) -> str:
        """A short-lived JWT (HS256), which clients decode for `exp` and send with their next requests."""
        now = int(self._clock.now())
        header = _b64(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
        claims = {"sub": caller.token_id or caller.task_id, "iat": now, "exp": now + AUTH_TOKEN_LIFETIME_S}
        body = f"{header}.{_b64(json.dumps(claims).encode())}"
        return f"{body}.{_b64(hmac.digest(self._key, body.encode(), 'sha256'))}"

    def _forget(self, token_id: str) -> None:
        for key in [key for key in self._checked if key[0] == token_id]:
            del self._checked[key]


def _insert(connection: Connection, token: Token) -> None:
    storage.insert(connection, token)
    for environment_id, role in token.roles.items():
        _restrict(connection, environment_id, role)


def _restrict(connection: Connection, environment_id: str, role: Role | None) -> None:
    """Whoever may deploy into an environment runs code there: it must not reach where they may not."""
    if role is not None and role >= Role.CONTRIBUTOR:
        environment_storage.restrict(connection, environment_id)


def hash_of(secret: str) -> bytes:
    """Secrets have 131 random bits: a plain hash cannot be guessed back."""
    return hashlib.sha256(secret.encode()).digest()


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
