"""What a Function may depend on: objects that exist and that its caller may use, as its containers are told of them."""

import asyncio
from collections.abc import Awaitable, Callable

from modal_proto import api_pb2

from aeolian.domain.caller import Caller

Describe = Callable[[set[str], Caller], Awaitable[dict[str, api_pb2.Object]]]
"""Of these ids, those that exist, with what containers are told of them."""


class Dependencies:
    """Asks each noun for the ids that carry its prefix."""

    def __init__(self, by_prefix: dict[str, Describe]):
        self._by_prefix = by_prefix

    async def describe(self, object_ids: set[str], caller: Caller) -> dict[str, api_pb2.Object]:
        groups: dict[str, set[str]] = {}
        for object_id in object_ids:
            groups.setdefault(object_id.partition("-")[0], set()).add(object_id)
        known = [(prefix, ids) for prefix, ids in groups.items() if prefix in self._by_prefix]
        found: dict[str, api_pb2.Object] = {}
        for described in await asyncio.gather(*(self._by_prefix[prefix](ids, caller) for prefix, ids in known)):
            found.update(described)
        return found
