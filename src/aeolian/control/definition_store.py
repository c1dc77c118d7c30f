"""Definitions by id, parsed, the recently used ones in memory."""

from collections import OrderedDict

import msgspec
from modal_proto import api_pb2

from aeolian.domain.errors import NotFound
from aeolian.storage import functions as storage
from aeolian.storage.database import Database
from aeolian.storage.functions import DefinitionRow

MAX_KEPT_BYTES = 64 << 20


class Definition(msgspec.Struct, frozen=True):
    definition_id: str
    functions: list[api_pb2.Function]
    """Ranked, the one that runs first. Shared: do not change them."""
    dependencies: list[api_pb2.Object]
    """One for each of `object_dependencies`, with its handle metadata."""
    sdk_version: str
    num_bytes: int


class DefinitionStore:
    def __init__(self, database: Database):
        self._database = database
        self._kept: OrderedDict[str, Definition] = OrderedDict()
        self._num_bytes = 0

    def get(self, definition_id: str) -> Definition:
        """Reads it (one indexed row) where it is not in memory. Raises NotFound."""
        kept = self._kept.get(definition_id)
        if kept is not None:
            self._kept.move_to_end(definition_id)
            return kept
        row = self._database.read_now(lambda c: storage.get_definition(c, definition_id))
        if row is None:
            raise NotFound(f"there is no definition {definition_id!r}")
        return self.take(row)

    def take(self, row: DefinitionRow) -> Definition:
        """Parse and keep a row that was read or written."""
        if row.definition_id in self._kept:
            return self._kept[row.definition_id]
        data = api_pb2.FunctionData.FromString(row.content)
        definition = Definition(
            definition_id=row.definition_id,
            functions=[item.function for item in data.ranked_functions],
            dependencies=list(api_pb2.AppLayout.FromString(row.dependencies).objects),
            sdk_version=row.sdk_version,
            num_bytes=len(row.content) + len(row.dependencies),
        )
        self._kept[row.definition_id] = definition
        self._num_bytes += definition.num_bytes
        while self._num_bytes > MAX_KEPT_BYTES and len(self._kept) > 1:
            self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes
        return definition
