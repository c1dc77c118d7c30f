"""Who reaches which environment: where objects are at home, and whether a caller has the right that it needs there.

Only callers with roles ask: those who manage everything are not looked at.
"""

import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping

from aeolian.control.environments import Environments
from aeolian.domain.caller import Caller
from aeolian.domain.errors import NotFound, PermissionDenied
from aeolian.domain.roles import Right, Role
from aeolian.storage.database import Database, is_reply_kept

Home = Callable[[str, Caller], Awaitable[str | None]]
"""(object id, who asks) -> id of the environment that the object is in, None when there is no such object."""

MAX_KNOWN = 10_000
OBJECT_ID = re.compile(r"([a-z]{2})-[0-9A-Za-z:_-]+")
HOMELESS = frozenset({"ac", "ak", "bl", "de", "im", "ir", "mo", "su", "wk"})
"""Prefixes of ids that say nothing of an environment."""


class Access:
    def __init__(self, database: Database, environments: Environments, homes: Mapping[str, Home]):
        """`homes` by the prefix of the ids that each knows."""
        self._database = database
        self._environments = environments
        self._homes = homes
        self._known: OrderedDict[str, str] = OrderedDict()

    async def home_of(self, object_id: str, caller: Caller) -> str | None:
        """Id of the object's environment; None for one that does not exist, and for what is in none.

        Raises PermissionDenied for kinds of objects whose environment nobody can tell.
        """
        match = OBJECT_ID.fullmatch(object_id)
        if match is None or (prefix := match.group(1)) in HOMELESS:
            return None
        if prefix == "en":
            return object_id
        if (known := self._known.get(object_id)) is not None:
            self._known.move_to_end(object_id)
            return known
        if (home := self._homes.get(prefix)) is None:
            raise PermissionDenied(f"whether your token may use {object_id} cannot be told: use one without roles")
        try:
            found = await home(object_id, caller)
        except NotFound:
            return None
        if found is not None:
            self._known[object_id] = found
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return found

    async def was_done(self, once: str | None) -> bool:
        """Whether the request of that name (`Caller.once`) was carried out before: then it was allowed."""
        return once is not None and await self._database.read(lambda c: is_reply_kept(c, once))

    def environment(self, name: str, caller: Caller) -> str:
        """The id of an environment by its name. Raises NotFound."""
        return self._environments.resolve(name, caller).id

    def name_of(self, environment_id: str) -> str:
        environment = self._environments.by_id(environment_id)
        return environment.name if environment is not None else ""

    def check(self, caller: Caller, right: Right, environment_ids: Iterable[str]) -> None:
        """Raises PermissionDenied when the caller lacks the right in one of them."""
        roles = caller.roles
        assert roles is not None
        for environment_id in environment_ids:
            if roles.get(environment_id, Role.NO_ACCESS) < right:
                raise PermissionDenied(self._refusal(caller, right, environment_id))

    async def learn_of_restriction(self, environment_ids: Iterable[str]) -> None:
        """Somebody with roles is about to change something there: maybe by a token that was made a moment ago."""
        if not all(map(self._environments.is_restricted, environment_ids)):
            await self._environments.refresh()

    def check_anywhere(self, caller: Caller, right: Right) -> None:
        assert caller.roles is not None
        if max(caller.roles.values(), default=Role.NO_ACCESS) < right:
            raise PermissionDenied(f"{_who(caller)} is in no environment {_a(Role(right))}, which this needs")

    def check_everywhere(self, caller: Caller, right: Right) -> None:
        """For what tells of all environments at once. Raises PermissionDenied."""
        if caller.roles is not None:
            self.check(caller, right, [environment.id for environment in self._environments.all()])

    def _refusal(self, caller: Caller, right: Right, environment_id: str) -> str:
        environment = self._environments.by_id(environment_id)
        where = f"environment '{environment.name}'" if environment else "that environment"
        if caller.is_container:
            return f"containers of environment '{caller.environment_name}' stay inside it: this is in {where}"
        assert caller.roles is not None
        role = caller.roles.get(environment_id, Role.NO_ACCESS)
        has = f"is only {_a(role)} of it" if role else "has no role there"
        return f"this needs {_a(Role(right))} of {where}, and {_who(caller)} {has}: who manages it can change that"


def _who(caller: Caller) -> str:
    return f"container {caller.task_id}" if caller.is_container else f"your token '{caller.name}'"


def _a(role: Role) -> str:
    return f"a {role.label}"
