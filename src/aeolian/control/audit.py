"""The audit trail: every change that somebody made or was refused, stored before it is acknowledged."""

import logging
from collections.abc import Iterable

from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import AeolianError
from aeolian.storage import audit as storage
from aeolian.storage.audit import AuditEntry
from aeolian.storage.database import Database

log = logging.getLogger(__name__)

KEPT_S = 365 * 24 * 3600.0
CLEAN_S = 3600.0
"""How often entries that are too old are looked for."""
MAX_REFUSALS = 60
REFUSALS_S = 60.0
"""Of one caller so many refusals are recorded in this time: it cannot fill the disk with them."""
MAX_TARGET_LENGTH = 300
LOCAL = "local"


class AuditTrail:
    def __init__(self, database: Database, clock: Clock):
        self._database = database
        self._clock = clock
        self._cleaned_at = float("-inf")
        self._refusals: dict[str, int] = {}
        self._refusals_since = float("-inf")

    async def record(
        self, caller: Caller, action: str, environment: str, targets: Iterable[str], result: str = "done"
    ) -> None:
        """Never raises: what was done stays done, and the log tells of an entry that could not be stored."""
        if result != "done" and not self._takes_refusal(caller):
            return
        await self._store(
            caller.name or caller.task_id, caller.token_id or caller.task_id, action, environment, targets, result
        )

    async def record_local(self, action: str, environment: str, targets: Iterable[str]) -> None:
        """A command on the server's machine."""
        await self._store(LOCAL, LOCAL, action, environment, targets, "done")

    async def entries(self, *, since: float = 0.0, of: str = "", limit: int = 1000) -> list[AuditEntry]:
        """The newest ones, the oldest of them first. `of`: id or name of a token, or id of a container."""
        return await self._database.read(lambda c: storage.entries(c, since=since, caller_id=of, limit=limit))

    async def _store(
        self, who: str, caller_id: str, action: str, environment: str, targets: Iterable[str], result: str
    ) -> None:
        now = self._clock.now()
        target = " ".join(targets)[:MAX_TARGET_LENGTH]
        entry = AuditEntry(now, who, caller_id, action, environment, target, result)
        old = now - KEPT_S if self._clock.monotonic() - self._cleaned_at > CLEAN_S else 0.0

        def write(connection) -> None:
            storage.append(connection, entry)
            if old:
                storage.delete_before(connection, old)

        try:
            await self._database.write(write)
        except AeolianError as error:
            log.error("the audit trail misses %s by %s on %s (%s): %s", action, who, target, result, error.message)
            return
        if old:
            self._cleaned_at = self._clock.monotonic()

    def _takes_refusal(self, caller: Caller) -> bool:
        if self._clock.monotonic() - self._refusals_since > REFUSALS_S:
            self._refusals.clear()
            self._refusals_since = self._clock.monotonic()
        caller_id = caller.token_id or caller.task_id
        count = self._refusals[caller_id] = self._refusals.get(caller_id, 0) + 1
        return count <= MAX_REFUSALS
