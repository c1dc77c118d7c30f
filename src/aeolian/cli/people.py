"""What commands about tokens, limits and the audit trail work on: the database, beside a running server or without one."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from aeolian.cli.open_database import open_database
from aeolian.cli.settings import Settings
from aeolian.control.audit import AuditTrail
from aeolian.control.environments import Environments
from aeolian.control.tokens import Tokens
from aeolian.domain.caller import Caller
from aeolian.domain.clock import SystemClock
from aeolian.domain.errors import InvalidArgument
from aeolian.domain.roles import Role, role_named
from aeolian.storage.database import Database
from aeolian.storage.environments import Environment

T = TypeVar("T")
LOCAL = Caller(workspace="")


class People:
    def __init__(self, database: Database):
        clock = SystemClock()
        self.tokens = Tokens(database, clock, key=b"")
        self.environments = Environments(database, clock)
        self.trail = AuditTrail(database, clock)

    def environment(self, name: str) -> Environment:
        """Raises NotFound."""
        return self.environments.resolve(name, LOCAL)

    def roles(self, texts: Sequence[str]) -> dict[str, Role]:
        """Of `ENV=ROLE`, by environment id. Raises InvalidArgument, NotFound."""
        found = {}
        for text in texts:
            name, equals, role = text.rpartition("=")
            if not (name and equals):
                raise InvalidArgument(f"{text!r} gives no role: write an environment and a role, as in main=viewer")
            found[self.environment(name).id] = role_named(role)
        return found


def with_people(settings: Settings, do: Callable[[People], Awaitable[T]]) -> T:
    """Carry it out on the database, beside a running server."""

    async def run() -> T:
        database = open_database(settings)
        database.open()
        people = People(database)
        try:
            await people.environments.load()
            return await do(people)
        finally:
            await database.close()

    return asyncio.run(run())
