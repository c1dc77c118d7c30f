"""Secrets: sets of environment variables, encrypted at rest (AES-256-GCM), readable only for containers' starts."""

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy.engine import Connection

from aeolian.control.named_objects import Environments, NamedObjects
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import FailedPrecondition, InvalidArgument, NotFound
from aeolian.storage import secrets as storage
from aeolian.storage.database import Database
from aeolian.storage.named_objects import NamedObject

log = logging.getLogger(__name__)

KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MAX_KEYS = 512
MAX_BYTES = 512 << 10
NONCE_BYTES = 12
USED_EVERY_S = 60.0
"""How exactly it is recorded when a Secret was used last."""
EPHEMERAL_S = 24 * 3600.0
"""Secrets without a name and an app have no heartbeat: they live for a day after their last use."""


class SecretInfo(NamedTuple):
    item: NamedObject
    keys: tuple[str, ...]
    last_used_at: float


class Secrets:
    def __init__(self, database: Database, clock: Clock, environments: Environments, key: bytes):
        """`key`: 32 bytes; without it, what is stored cannot be read any more."""
        self._database = database
        self._clock = clock
        self._cipher = AESGCM(key)
        self._fingerprint_key = hashlib.sha256(b"fingerprints of secrets\0" + key).digest()
        self.objects = NamedObjects("secret", database, clock, environments, storage.delete, silent_after_s=EPHEMERAL_S)

    async def create(
        self, name: str, environment_name: str, caller: Caller, env: Mapping[str, str], *, if_exists: str
    ) -> NamedObject:
        values = _checked(env)
        return await self.objects.create(name, environment_name, caller, if_exists=if_exists, fill=self._filler(values))

    async def create_anonymous(
        self, environment_name: str, caller: Caller, env: Mapping[str, str], *, app_id: str = ""
    ) -> NamedObject:
        values = _checked(env)
        return await self.objects.create_anonymous(environment_name, caller, app_id=app_id, fill=self._filler(values))

    async def lookup(
        self, name: str, environment_name: str, caller: Caller, required_keys: Sequence[str] = ()
    ) -> NamedObject:
        """Raises NotFound, or FailedPrecondition when a required key is missing."""
        item = await self.objects.lookup(name, environment_name, caller)
        if required_keys:
            keys = (await self.info(item.object_id, caller)).keys
            if missing := sorted(set(required_keys) - set(keys)):
                # The JavaScript client knows it by its first words.
                raise FailedPrecondition(
                    f"Secret is missing key(s): {', '.join(missing)}. '{name}' has {', '.join(keys)}: add the others by "
                    f"`modal secret create {name} --force …` or `Secret.update`"
                )
        return item

    async def info(self, secret_id: str, caller: Caller) -> SecretInfo:
        item = await self.objects.get(secret_id, caller)
        return (await self.infos([item]))[0]

    async def infos(self, items: Sequence[NamedObject]) -> list[SecretInfo]:
        stored = await self._database.read(lambda c: storage.get_many(c, [item.object_id for item in items]))
        found = []
        for item in items:
            encrypted, used_at = stored.get(item.object_id, (b"", 0.0))
            keys = tuple(sorted(self._decrypt(item.object_id, encrypted))) if encrypted else ()
            found.append(SecretInfo(item, keys, used_at))
        return found

    async def update(self, secret_id: str, caller: Caller, updates: Mapping[str, str | None]) -> None:
        """Set (or, with None, remove) variables. Containers started from now on see it."""
        set_values = _checked({key: value for key, value in updates.items() if value is not None})

        def update(connection: Connection) -> None:
            self.objects.existing(connection, secret_id, caller)
            encrypted, _ = storage.get_many(connection, [secret_id])[secret_id]
            values = {k: v for k, v in self._decrypt(secret_id, encrypted).items() if k not in updates}
            values = _checked({**values, **set_values})
            storage.put(connection, secret_id, self._encrypt(secret_id, values))

        await self._database.write(update)

    async def env_of(self, secret_ids: Sequence[str]) -> dict[str, str]:
        """The variables of these Secrets; those of later ones win. Raises NotFound for one that is gone."""
        ids = list(secret_ids)
        stored = await self._database.read(lambda c: storage.get_many(c, ids))
        env: dict[str, str] = {}
        for secret_id in ids:
            if secret_id not in stored:
                raise NotFound(f"Secret {secret_id} was deleted: create it again, then deploy the App again")
            env.update(self._decrypt(secret_id, stored[secret_id][0]))
        self.objects.used(ids)
        now = self._clock.now()
        if any(now - used_at > USED_EVERY_S for _, used_at in stored.values()):
            await self._database.write(lambda c: storage.used(c, ids, now))
        return env

    async def fingerprint(self, secret_ids: Sequence[str]) -> str:
        """Equal for equal variables, whichever Secrets they are in; tells nothing about them without the key."""
        if not secret_ids:
            return ""
        values = msgspec.json.encode(sorted((await self.env_of(secret_ids)).items()))
        return hmac.digest(self._fingerprint_key, values, "sha256").hex()

    def _filler(self, values: dict[str, str]):
        return lambda connection, secret_id: storage.put(connection, secret_id, self._encrypt(secret_id, values))

    def _encrypt(self, secret_id: str, values: dict[str, str]) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, msgspec.json.encode(values), secret_id.encode())

    def _decrypt(self, secret_id: str, encrypted: bytes) -> dict[str, str]:
        try:
            plain = self._cipher.decrypt(encrypted[:NONCE_BYTES], encrypted[NONCE_BYTES:], secret_id.encode())
        except InvalidTag:
            raise FailedPrecondition(
                f"Secret {secret_id} cannot be decrypted: the key file of the data directory is not the one it was "
                "encrypted with. Restore keys/secrets, or create the Secret again"
            ) from None
        return msgspec.json.decode(plain, type=dict[str, str])


def _checked(env: Mapping[str, str]) -> dict[str, str]:
    if len(env) > MAX_KEYS:
        raise InvalidArgument(f"a Secret can have {MAX_KEYS} variables, not {len(env)}")
    size = 0
    for key, value in env.items():
        if not KEY.fullmatch(key):
            raise InvalidArgument(
                f"{key!r} cannot be an environment variable: use letters, digits and underscores, not a digit first"
            )
        if "\0" in value:
            raise InvalidArgument(f"the value of {key} contains a null character, which no environment variable can")
        size += len(key) + len(value.encode())
    if size > MAX_BYTES:
        raise InvalidArgument(
            f"the Secret has {size:,} bytes, the limit is {MAX_BYTES:,}: put large values into a Volume"
        )
    return dict(env)
