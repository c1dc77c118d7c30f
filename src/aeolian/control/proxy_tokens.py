"""Proxy tokens: who may reach web functions that are not open to everybody. Only hashes of their secrets are kept.

A token is for every environment until it is first allowed to one; from then on it is for those it is allowed to.
"""

import asyncio
import hmac
import secrets

import msgspec

from aeolian.control.environments import Environments
from aeolian.control.tokens import hash_of
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import FailedPrecondition, InvalidArgument, NotFound
from aeolian.domain.ids import content_id
from aeolian.storage import proxy_tokens as storage
from aeolian.storage.database import Database
from aeolian.storage.proxy_tokens import ProxyToken

MAX_NAME_LENGTH = 200


class ProxyTokens:
    def __init__(self, database: Database, clock: Clock, environments: Environments, key: bytes):
        """`key`: with it the secret of a repeated request is made again."""
        self._key = key
        self._database = database
        self._clock = clock
        self._environments = environments
        self._tokens: dict[str, ProxyToken] = {}
        self._changing = asyncio.Lock()

    async def load(self) -> None:
        self._tokens = {token.token_id: token for token in await self._database.read(storage.list_all)}

    async def create(self, caller: Caller, name: str, *, is_scoped: bool, once: str | None = None) -> tuple[str, str]:
        """A new token: (id, secret). `once` names the request: a repetition gets the same, although no secret is kept."""
        seed = hmac.digest(self._key, once.encode(), "sha256") if once else secrets.token_bytes(32)
        token_id, secret = (content_id(noun, seed + noun.encode()) for noun in ("proxy_token", "proxy_token_secret"))
        if token_id in self._tokens:
            return token_id, secret
        token = ProxyToken(
            token_id=token_id,
            secret_hash=hash_of(secret),
            name=_checked_name(name),
            workspace=caller.workspace,
            is_scoped=is_scoped,
            created_at=self._clock.now(),
            created_by=caller.name,
        )
        await self._put(token)
        return token.token_id, secret

    def all(self, caller: Caller) -> list[ProxyToken]:
        return [token for token in self._tokens.values() if token.workspace == caller.workspace]

    def get(self, token_id: str, caller: Caller) -> ProxyToken:
        token = self._tokens.get(token_id)
        if token is None or token.workspace != caller.workspace:
            raise NotFound(
                f"there is no proxy token {token_id!r}: `modal workspace proxy-tokens list` shows those there are"
            )
        return token

    async def rename(self, token_id: str, name: str, caller: Caller) -> ProxyToken:
        async with self._changing:
            token = msgspec.structs.replace(self.get(token_id, caller), name=_checked_name(name))
            await self._put(token)
        return token

    async def allow(self, token_id: str, environment_id: str, caller: Caller) -> None:
        """For this environment too; the first time: for this one only."""
        if self._environments.by_id(environment_id) is None:
            raise NotFound(f"there is no environment {environment_id!r}")
        async with self._changing:
            token = self.get(token_id, caller)
            places = token.environment_ids | {environment_id}
            await self._put(msgspec.structs.replace(token, is_scoped=True, environment_ids=places))

    async def revoke(self, token_id: str, environment_id: str, caller: Caller) -> None:
        """Not for this environment any more."""
        async with self._changing:
            token = self.get(token_id, caller)
            if not token.is_scoped:
                raise FailedPrecondition(
                    f"{token_id} is for every environment: allow it to those it is for with "
                    f"`modal workspace proxy-tokens allow {token_id} ENVIRONMENT`, or delete it"
                )
            places = token.environment_ids - {environment_id}
            await self._put(msgspec.structs.replace(token, environment_ids=places))

    async def delete(self, token_id: str, caller: Caller) -> None:
        """Nothing happens when it is gone already."""
        token = self._tokens.get(token_id)
        if token is not None and token.workspace == caller.workspace:
            await self._database.write(lambda c: storage.delete(c, token_id))
            self._tokens.pop(token_id, None)

    def allows(self, token_id: str, secret: str, workspace: str, environment_id: str) -> bool:
        """Whether who shows these may reach web functions of this environment."""
        token = self._tokens.get(token_id)
        given = hash_of(secret)
        if token is None or not hmac.compare_digest(given, token.secret_hash):
            return False
        return token.workspace == workspace and token.is_for(environment_id)

    async def _put(self, token: ProxyToken) -> None:
        await self._database.write(lambda c: storage.put(c, token))
        self._tokens[token.token_id] = token


def _checked_name(name: str) -> str:
    if len(name) > MAX_NAME_LENGTH or "\0" in name:
        raise InvalidArgument(
            f"{name[:80]!r} cannot be the name of a proxy token: use up to {MAX_NAME_LENGTH} characters"
        )
    return name
