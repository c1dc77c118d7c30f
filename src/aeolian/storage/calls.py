"""Calls, their unfinished inputs, their outputs, and the chunks of their streams.

An input has a row in `inputs` until it is finished, then one in `outputs`: what there is to do after a restart
is the first table, whole. An input's id follows from its call and its index.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Row

from aeolian.storage.database import keep_reply, metadata

calls = sa.Table(
    "calls",
    metadata,
    sa.Column("call_id", sa.String, primary_key=True),
    sa.Column("function_id", sa.String, nullable=False),
    sa.Column("app_id", sa.String, nullable=False),
    sa.Column("workspace", sa.String, nullable=False),
    sa.Column("call_type", sa.SmallInteger, nullable=False),
    sa.Column("invocation", sa.SmallInteger, nullable=False),
    sa.Column("parent_call_id", sa.String, nullable=False),
    sa.Column("parent_idx", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=True),
    sa.Column("is_cancelled", sa.Boolean, nullable=False),
    sa.Index("calls_of_function", "function_id", "created_at"),
)
"""`expires_at`: set when the last input is finished, or the caller says that it is done; then the row may go."""

sa.Index(
    "calls_by_parent",
    calls.c.parent_call_id,
    sqlite_where=calls.c.parent_call_id != "",
    postgresql_where=calls.c.parent_call_id != "",
)
sa.Index(
    "calls_by_expiry",
    calls.c.expires_at,
    sqlite_where=calls.c.expires_at.is_not(None),
    postgresql_where=calls.c.expires_at.is_not(None),
)

inputs = sa.Table(
    "inputs",
    metadata,
    sa.Column("call_id", sa.String, primary_key=True),
    sa.Column("idx", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.Column("retry_count", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("due_at", sa.Float, nullable=False),
)
"""`payload`: a serialized FunctionInput. `due_at`: not before this time (a retry's delay)."""

outputs = sa.Table(
    "outputs",
    metadata,
    sa.Column("call_id", sa.String, primary_key=True),
    sa.Column("idx", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("item", sa.LargeBinary, nullable=False),
    sa.Column("status", sa.SmallInteger, nullable=False),
    sa.Column("retry_count", sa.Integer, nullable=False),
    sa.Column("task_id", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("finished_at", sa.Float, nullable=False),
    sa.Index("outputs_in_order", "call_id", "seq"),
)
"""`item`: a serialized FunctionGetOutputsItem; empty when nobody will ask for it any more.
`seq`: the order of finishing within the call, from 1."""

chunks = sa.Table(
    "call_chunks",
    metadata,
    sa.Column("call_id", sa.String, primary_key=True),
    sa.Column("direction", sa.SmallInteger, primary_key=True, autoincrement=False),
    sa.Column("idx", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("chunk", sa.LargeBinary, nullable=False),
)
"""Chunks of generators and web bodies: serialized DataChunk messages. `direction`: 0 in, 1 out."""

blobs = sa.Table(
    "call_blobs",
    metadata,
    sa.Column("call_id", sa.String, nullable=False, index=True),
    sa.Column("blob_id", sa.String, nullable=False),
)
"""Blobs that carry arguments, results or chunks of a call, and go with it. One may be named more than once."""

ASYNC_INVOCATIONS = (2, 3)


def _if_new(table: sa.Table) -> dict[str, sa.Insert]:
    """By dialect: insert rows that are not there. A commit whose answer was lost is simply repeated."""
    kinds = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
    return {dialect: insert(table).on_conflict_do_nothing() for dialect, insert in kinds.items()}


_put_call = _if_new(calls)
_put_blob = blobs.insert()
_expire_call = calls.update().where(calls.c.call_id == sa.bindparam("id")).values(expires_at=sa.bindparam("at"))
_cancel_call = calls.update().where(calls.c.call_id == sa.bindparam("id")).values(is_cancelled=True)
_put_input = _if_new(inputs)
_drop_input = inputs.delete().where(inputs.c.call_id == sa.bindparam("id"), inputs.c.idx == sa.bindparam("n"))
_update_input = (
    inputs.update()
    .where(inputs.c.call_id == sa.bindparam("id"), inputs.c.idx == sa.bindparam("n"))
    .values(retry_count=sa.bindparam("retries"), due_at=sa.bindparam("due"))
)
_put_output = outputs.insert()
_drop_output = outputs.delete().where(outputs.c.call_id == sa.bindparam("id"), outputs.c.idx == sa.bindparam("n"))


@dataclass
class CallWrites:
    """Changes of many calls that are committed together. Keys are (call id, index)."""

    calls: list[dict] = field(default_factory=list)
    expiries: dict[str, float | None] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    dropped_inputs: set[tuple[str, int]] = field(default_factory=set)
    inputs: dict[tuple[str, int], dict] = field(default_factory=dict)
    updated_inputs: dict[tuple[str, int], tuple[int, float]] = field(default_factory=dict)
    """(retry count, due time)"""
    dropped_outputs: set[tuple[str, int]] = field(default_factory=set)
    outputs: dict[tuple[str, int], dict] = field(default_factory=dict)
    blobs: list[dict] = field(default_factory=list)
    together_with: list[Callable[[Connection], None]] = field(default_factory=list)
    """Changes of other nouns that are made if these calls are stored, and not otherwise."""
    replies: dict[str, list] = field(default_factory=dict)
    """What requests were answered, by the key of each (`database.kept_reply`)."""

    def put_input(self, row: dict, *, is_new: bool) -> None:
        """`is_new`: the database has no row of this input; else it is replaced."""
        key = (row["call_id"], row["idx"])
        if not is_new:
            self.dropped_inputs.add(key)
        self.inputs[key] = row

    def finish_input(self, output: dict) -> None:
        """The input is done: its row goes, its output comes."""
        key = (output["call_id"], output["idx"])
        if self.inputs.pop(key, None) is None:
            self.dropped_inputs.add(key)
            self.updated_inputs.pop(key, None)
        self.outputs[key] = output

    def update_input(self, key: tuple[str, int], retry_count: int, due_at: float) -> None:
        """An unfinished input is tried again."""
        if (row := self.inputs.get(key)) is not None:
            row["retry_count"], row["due_at"] = retry_count, due_at
        else:
            self.updated_inputs[key] = (retry_count, due_at)

    def reopen_input(self, row: dict) -> None:
        """A finished input is tried again: its output goes."""
        key = (row["call_id"], row["idx"])
        if self.outputs.pop(key, None) is None:
            self.dropped_outputs.add(key)
        self.put_input(row, is_new=False)

    @property
    def has_changes(self) -> bool:
        return any(getattr(self, name) for name in self.__dataclass_fields__)

    def take_back_new(self) -> None:
        """Calls and inputs that were asked for just now are not stored after all."""
        refused = {row["call_id"] for row in self.calls}
        self.blobs = [row for row in self.blobs if row["call_id"] not in refused]
        self.calls, self.together_with = [], []
        self.inputs = {key: row for key, row in self.inputs.items() if key in self.dropped_inputs}

    def apply(self, connection: Connection) -> None:
        run = connection.execute
        if self.calls:
            run(_put_call[connection.dialect.name], self.calls)
        for change in self.together_with:
            change(connection)
        if self.dropped_outputs:
            run(_drop_output, [{"id": call_id, "n": idx} for call_id, idx in self.dropped_outputs])
        if self.dropped_inputs:
            run(_drop_input, [{"id": call_id, "n": idx} for call_id, idx in self.dropped_inputs])
        if self.inputs:
            run(_put_input[connection.dialect.name], list(self.inputs.values()))
        if self.updated_inputs:
            changed = self.updated_inputs.items()
            run(_update_input, [{"id": key[0], "n": key[1], "retries": n, "due": at} for key, (n, at) in changed])
        if self.outputs:
            run(_put_output, list(self.outputs.values()))
        if self.blobs:
            run(_put_blob, self.blobs)
        if self.cancelled:
            run(_cancel_call, [{"id": call_id} for call_id in self.cancelled])
        for key, reply in self.replies.items():
            keep_reply(connection, key, reply)
        if self.expiries:
            run(_expire_call, [{"id": call_id, "at": at} for call_id, at in self.expiries.items()])


def get_call(connection: Connection, call_id: str) -> Row | None:
    return connection.execute(sa.select(calls).where(calls.c.call_id == call_id)).first()


def get_calls(connection: Connection, call_ids: Sequence[str]) -> list[Row]:
    return [
        row
        for some in _portions(call_ids)
        for row in connection.execute(sa.select(calls).where(calls.c.call_id.in_(some)))
    ]


def unfinished_calls(connection: Connection) -> list[Row]:
    """Every call that has an unfinished input."""
    return list(connection.execute(sa.select(calls).where(calls.c.call_id.in_(sa.select(inputs.c.call_id)))))


def unfinished_inputs(connection: Connection) -> list[Row]:
    """All unfinished inputs, oldest first, without their payloads."""
    columns = [column for column in inputs.c if column.name != "payload"]
    return list(connection.execute(sa.select(*columns).order_by(inputs.c.created_at, inputs.c.call_id, inputs.c.idx)))


def payloads(connection: Connection, keys: Sequence[tuple[str, int]]) -> dict[tuple[str, int], bytes]:
    found = {}
    by_call: dict[str, list[int]] = {}
    for call_id, idx in keys:
        by_call.setdefault(call_id, []).append(idx)
    for call_id, idxs in by_call.items():
        for some in _portions(idxs):
            query = sa.select(inputs.c.idx, inputs.c.payload).where(inputs.c.call_id == call_id, inputs.c.idx.in_(some))
            found.update({(call_id, row.idx): row.payload for row in connection.execute(query)})
    return found


def input_marks(connection: Connection, call_id: str) -> list[Row]:
    """(idx, retry_count) of the call's unfinished inputs."""
    return list(connection.execute(sa.select(inputs.c.idx, inputs.c.retry_count).where(inputs.c.call_id == call_id)))


def output_marks(connection: Connection, call_id: str) -> list[Row]:
    """(idx, seq, retry_count, status) of the call's outputs."""
    columns = (outputs.c.idx, outputs.c.seq, outputs.c.retry_count, outputs.c.status)
    return list(connection.execute(sa.select(*columns).where(outputs.c.call_id == call_id)))


def output_marks_of(connection: Connection, call_ids: Sequence[str]) -> list[Row]:
    columns = (outputs.c.call_id, outputs.c.idx, outputs.c.seq, outputs.c.retry_count, outputs.c.status)
    return [
        row
        for some in _portions(call_ids)
        for row in connection.execute(sa.select(*columns).where(outputs.c.call_id.in_(some)))
    ]


def outputs_after(connection: Connection, call_id: str, seq: int, limit: int, max_bytes: int) -> list[Row]:
    """The next outputs of a call in the order of finishing: at least one, and no more than `max_bytes`."""
    query = sa.select(outputs).where(outputs.c.call_id == call_id, outputs.c.seq > seq, outputs.c.item != b"")
    return _up_to(connection.execute(query.order_by(outputs.c.seq).limit(limit)), max_bytes)


def outputs_between(
    connection: Connection, call_id: str, first: int, last: int, limit: int, max_bytes: int
) -> list[Row]:
    """Outputs of the inputs `first` to `last`, both included: at least one, and no more than `max_bytes`."""
    query = sa.select(outputs).where(
        outputs.c.call_id == call_id, outputs.c.idx >= first, outputs.c.idx <= last, outputs.c.item != b""
    )
    return _up_to(connection.execute(query.order_by(outputs.c.idx).limit(limit)), max_bytes)


def _up_to(rows: Iterable[Row], max_bytes: int) -> list[Row]:
    """Read one by one: a thousand outputs may have 2 MiB each."""
    found: list[Row] = []
    num_bytes = 0
    for row in rows:
        num_bytes += len(row.item)
        if found and num_bytes > max_bytes:
            break
        found.append(row)
    return found


def children_of(connection: Connection, call_ids: Sequence[str]) -> list[Row]:
    """Calls made by inputs of these calls."""
    return [
        row
        for some in _portions(call_ids)
        for row in connection.execute(
            sa.select(calls).where(calls.c.parent_call_id.in_(some)).order_by(calls.c.created_at)
        )
    ]


def graph_inputs(connection: Connection, call_ids: Sequence[str], limit: int) -> list[tuple[str, int, int, str]]:
    """(call id, index, status, task id) of the calls' inputs, finished or not."""
    found: list[tuple[str, int, int, str]] = []
    for some in _portions(call_ids):
        for row in connection.execute(
            sa.select(outputs.c.call_id, outputs.c.idx, outputs.c.status, outputs.c.task_id)
            .where(outputs.c.call_id.in_(some))
            .limit(limit)
        ):
            found.append((row.call_id, row.idx, row.status, row.task_id))
        for row in connection.execute(
            sa.select(inputs.c.call_id, inputs.c.idx).where(inputs.c.call_id.in_(some)).limit(limit)
        ):
            found.append((row.call_id, row.idx, 0, ""))
    return found[:limit]


def inputs_of_calls(connection: Connection, call_ids: Sequence[str], limit: int | None = None) -> list[Row]:
    """Finished inputs: call id, index, status, task id, times. `limit`: of each portion of calls."""
    columns = [column for column in outputs.c if column.name not in ("item", "seq")]
    return [
        row
        for some in _portions(call_ids)
        for row in connection.execute(sa.select(*columns).where(outputs.c.call_id.in_(some)).limit(limit))
    ]


def expired_calls(connection: Connection, before: float, limit: int) -> list[str]:
    query = sa.select(calls.c.call_id).where(calls.c.expires_at < before).limit(limit)
    return list(connection.execute(query).scalars())


def expire_finished(connection: Connection, now: float, lifetimes_s: Mapping[str, float]) -> None:
    """After a start: calls that were finished before, and whose end nobody has noted, get one.

    `lifetimes_s`: of calls that somebody waits for (`sync`), made from inside others (`nested`), spawned (`async`).
    """
    lifetime_s = sa.case(
        (calls.c.invocation.in_(ASYNC_INVOCATIONS), lifetimes_s["async"]),
        (calls.c.parent_call_id != "", lifetimes_s["nested"]),
        else_=lifetimes_s["sync"],
    )
    connection.execute(
        calls.update()
        .where(calls.c.expires_at.is_(None), calls.c.call_id.not_in(sa.select(inputs.c.call_id)))
        .values(expires_at=now + lifetime_s)
    )


def empty_outputs(connection: Connection, call_id: str, first: int, last: int) -> None:
    """The caller has these outputs, or does not want them: only what became of the inputs is kept."""
    connection.execute(
        outputs.update()
        .where(outputs.c.call_id == call_id, outputs.c.idx >= first, outputs.c.idx <= last)
        .values(item=b"")
    )


def delete_payloads(connection: Connection, call_id: str) -> list[str]:
    """What a call that is over has streamed. Returns the ids of the blobs that it needs no more."""
    connection.execute(chunks.delete().where(chunks.c.call_id == call_id))
    return _take_blobs(connection, [call_id])


def delete_calls(connection: Connection, call_ids: Iterable[str]) -> list[str]:
    """Returns the ids of the blobs that go with them."""
    found = []
    for some in _portions(list(call_ids)):
        found += _take_blobs(connection, some)
        for table in (inputs, outputs, chunks, calls):
            connection.execute(table.delete().where(table.c.call_id.in_(some)))
    return found


def _take_blobs(connection: Connection, call_ids: Sequence[str]) -> list[str]:
    mine = blobs.c.call_id.in_(call_ids)
    found = list(connection.execute(sa.select(blobs.c.blob_id).where(mine).distinct()).scalars())
    if found:
        connection.execute(blobs.delete().where(mine))
    return found


def put_chunks(connection: Connection, rows: list[dict], blob_rows: list[dict]) -> None:
    """Chunks that are there already stay as they are: a retried generator sends them again."""
    if blob_rows:
        connection.execute(_put_blob, blob_rows)
    keys = {(row["call_id"], row["direction"]) for row in rows}
    for call_id, direction in keys:
        mine = {row["idx"]: row for row in rows if (row["call_id"], row["direction"]) == (call_id, direction)}
        there = connection.execute(
            sa.select(chunks.c.idx).where(
                chunks.c.call_id == call_id, chunks.c.direction == direction, chunks.c.idx.in_(list(mine))
            )
        ).scalars()
        for idx in there:
            del mine[idx]
        if mine:
            connection.execute(chunks.insert(), list(mine.values()))


def chunks_after(
    connection: Connection, call_id: str, direction: int, idx: int, limit: int, max_bytes: int
) -> list[Row]:
    """The next chunks: at least one, and no more than `max_bytes`."""
    query = sa.select(chunks.c.idx, chunks.c.chunk).where(
        chunks.c.call_id == call_id, chunks.c.direction == direction, chunks.c.idx > idx
    )
    found: list[Row] = []
    num_bytes = 0
    for row in connection.execute(query.order_by(chunks.c.idx).limit(limit)):
        num_bytes += len(row.chunk)
        if found and num_bytes > max_bytes:
            break
        found.append(row)
    return found


def unfinished_payloads(connection: Connection) -> Iterable[bytes]:
    """Payloads of inputs that are still to be run: their blobs are needed."""
    yield from connection.execute(sa.select(inputs.c.payload)).scalars()


def _portions(items: Sequence, size: int = 500) -> Iterable[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
