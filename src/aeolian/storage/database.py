"""The database: many readers, one writer thread with group commit.

Every change goes through `Database.write`. Jobs that arrive while a transaction is being committed share
the next one, so the cost of a commit is spread over all RPCs that wait for it (group commit). A job is
acknowledged only after its transaction is committed. A job that raises leaves nothing behind and does not
disturb the others in its group.
"""

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.domain.errors import OutOfSpace, Unavailable

T = TypeVar("T")
log = logging.getLogger(__name__)

metadata = sa.MetaData()

replies = sa.Table(
    "replies",
    metadata,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("reply", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False, index=True),
)
"""What `write(once=key)` answered, kept so that a repeated request gets the same answer after a restart."""

MAX_GROUP = 512
MAX_READERS = 4
REPLIES_KEPT_S = 3600.0
AWAY_S = 30.0
"""How long requests wait for a PostgreSQL that is away, before they are refused."""
RETRY_S = 0.2
POSTGRESQL_PATIENCE = {"connect_timeout": 5, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
"""So that a PostgreSQL whose machine is gone is noticed, and not waited for (seconds; a URL may say otherwise)."""
FORGET_EVERY_S = 300.0


class _Job(NamedTuple):
    fn: Callable[[Connection], Any]
    future: asyncio.Future
    rows: tuple[sa.Executable, Sequence[dict]] | None


class Database:
    """One database by SQLAlchemy URL (`sqlite:////path/aeolian.db`, `postgresql+psycopg://…`)."""

    def __init__(self, url: str):
        self.url = url
        self.engine = make_engine(url)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(MAX_READERS, thread_name_prefix="db-read")
        self._writer: threading.Thread | None = None
        self._closed = False
        self.num_commits = 0

    def open(self) -> None:
        """Start the writer. The schema must be there (`storage.migrate`)."""
        self._writer = threading.Thread(target=self._write_loop, name="db-write", daemon=True)
        self._writer.start()

    async def close(self) -> None:
        """Commit what is queued, then stop."""
        if self._writer is not None and not self._closed:
            self._closed = True
            self._jobs.put(None)
            await asyncio.to_thread(self._writer.join)
        self._readers.shutdown()
        self.engine.dispose()

    async def write(self, fn: Callable[[Connection], T], *, once: str | None = None, kind: Any = Any) -> T:
        """Run `fn(connection)` in a write transaction; return its result after the commit.

        `fn` may run twice (when a neighbour in its group failed), so it must have no effect but on the
        connection. With `once`, a key that names the request, the result (of type `kind`, where it is more than
        plain values) is stored in the same transaction, and a later write with the same key returns it without
        running `fn`.

        Raises what `fn` raises, `OutOfSpace` when the disk is full, `Unavailable` when the database is away.
        """
        return await self._submit(fn if once is None else _Once(fn, once, kind), None)

    async def append(self, statement: sa.Executable, rows: Sequence[dict]) -> None:
        """Execute `statement` for `rows`; neighbouring appends of the same statement object become one call."""
        await self._submit(lambda connection: connection.execute(statement, rows), (statement, rows))

    def append_nowait(self, statement: sa.Executable, rows: Sequence[dict]) -> asyncio.Future:
        """As `append`, queued before this returns: later writes are committed after it (or with it)."""
        return self._submit(lambda connection: connection.execute(statement, rows), (statement, rows))

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn(connection)` in a reader thread on the last committed state.

        Waits a while for a PostgreSQL that is away, then raises `Unavailable`.
        """
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read_patiently, fn)

    def read_now(self, fn: Callable[[Connection], T]) -> T:
        """As `read`, blocking: for start-up and tools."""
        try:
            with self.engine.connect() as connection:
                return fn(connection)
        except sa.exc.OperationalError as error:
            raise _translate(error).error from error

    def _submit(self, fn: Callable[[Connection], Any], rows) -> asyncio.Future:
        if self._closed:
            raise Unavailable("the server is shutting down; try again")
        future = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(fn, future, rows))
        return future

    def _write_loop(self) -> None:
        connection: Connection | None = None
        stopping = False
        forget_at = 0.0
        while not stopping:
            jobs: list[_Job] = []
            job = self._jobs.get()
            while True:
                if job is None:
                    stopping = True
                    break
                jobs.append(job)
                if len(jobs) >= MAX_GROUP:
                    break
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
            if not jobs:
                continue
            try:
                connection = self._connected(connection)
                outcomes = _run_group(connection, jobs)
            except Exception as error:  # the connection itself failed: nobody's job is done
                outcomes = [_translate(error)] * len(jobs)
                if connection is not None:
                    connection.invalidate()
                    connection.close()
                    connection = None
            self.num_commits += 1
            _resolve(jobs, outcomes)
            if connection is not None and time.monotonic() >= forget_at:
                forget_at = time.monotonic() + FORGET_EVERY_S
                _forget_old_replies(connection)
        if connection is not None:
            connection.close()

    def _connected(self, connection: Connection | None) -> Connection:
        """The writer's connection, made anew where it broke. Waits while PostgreSQL is away: nothing was begun yet."""
        until = time.monotonic() + AWAY_S
        while True:
            try:
                if connection is None or connection.closed or connection.invalidated:
                    return self.engine.connect().execution_options(is_writer=True)
                if self.engine.dialect.name != "sqlite":
                    self.engine.dialect.do_ping(connection.connection.dbapi_connection)
                return connection
            except (sa.exc.DBAPIError, self.engine.dialect.loaded_dbapi.Error):
                if connection is not None and not connection.closed:
                    connection.invalidate()
                    connection.close()
                connection = None
                if self.engine.dialect.name == "sqlite" or self._closed or time.monotonic() >= until:
                    raise
                time.sleep(RETRY_S)

    def _read_patiently(self, fn: Callable[[Connection], T]) -> T:
        until = time.monotonic() + AWAY_S
        while True:
            try:
                return self.read_now(fn)
            except Unavailable:
                if self.engine.dialect.name == "sqlite" or self._closed or time.monotonic() >= until:
                    raise
                time.sleep(RETRY_S)


class _Once:
    """A write whose result is stored under a key, in the same transaction."""

    def __init__(self, fn: Callable[[Connection], Any], key: str, kind: Any):
        self.fn, self.key, self.kind = fn, key, kind

    def __call__(self, connection: Connection) -> Any:
        row = connection.execute(sa.select(replies.c.reply).where(replies.c.key == self.key)).first()
        if row is not None:
            return msgspec.msgpack.decode(row.reply, type=self.kind)
        result = self.fn(connection)
        connection.execute(replies.insert(), _reply_row(self.key, result))
        return result


def keep_reply(connection: Connection, key: str, reply: Any) -> None:
    """As `write(once=key)` does, for writes of several requests in one; the latest stays."""
    connection.execute(replies.delete().where(replies.c.key == key))
    connection.execute(replies.insert(), _reply_row(key, reply))


def _reply_row(key: str, reply: Any) -> dict[str, Any]:
    return {"key": key, "reply": msgspec.msgpack.encode(reply), "created_at": time.time()}


def kept_reply(connection: Connection, key: str) -> Any:
    """What a write with `once=key` has answered, or None."""
    row = connection.execute(sa.select(replies.c.reply).where(replies.c.key == key)).first()
    return msgspec.msgpack.decode(row.reply) if row is not None else None


def is_reply_kept(connection: Connection, key: str) -> bool:
    """Whether a write with `once=key` was carried out."""
    return connection.execute(sa.select(replies.c.key).where(replies.c.key == key)).first() is not None


def _forget_old_replies(connection: Connection) -> None:
    """Nobody repeats a request that is as old as this."""
    try:
        with connection.begin():
            connection.execute(replies.delete().where(replies.c.created_at < time.time() - REPLIES_KEPT_S))
    except Exception:
        log.exception("old replies could not be deleted; the next turn tries again")


class _Failure(NamedTuple):
    error: BaseException


def _run_group(connection: Connection, jobs: list[_Job]) -> list[Any]:
    """All jobs in one transaction; when one raises, each between savepoints; when the whole fails, each by itself."""
    try:
        with connection.begin():
            return _run_merged(connection, jobs)
    except Exception as error:
        if len(jobs) == 1:
            return [_translate(error)]
    try:
        with connection.begin():
            return [_run_apart(connection, job) for job in jobs]
    except Exception:  # the commit failed, or a job's error has undone everything, as that of a full disk does
        return [_run_group(connection, [job])[0] for job in jobs]


def _run_apart(connection: Connection, job: _Job) -> Any:
    savepoint = connection.begin_nested()
    try:
        outcome = job.fn(connection)
        savepoint.commit()
        return outcome
    except Exception as error:
        savepoint.rollback()
        return _translate(error)


def _run_merged(connection: Connection, jobs: list[_Job]) -> list[Any]:
    outcomes: list[Any] = []
    index = 0
    while index < len(jobs):
        job = jobs[index]
        if job.rows is None:
            outcomes.append(job.fn(connection))
            index += 1
            continue
        statement, rows = job.rows[0], list(job.rows[1])
        end = index + 1
        while end < len(jobs) and (other := jobs[end].rows) is not None and other[0] is statement:
            rows.extend(other[1])
            end += 1
        connection.execute(statement, rows)
        outcomes.extend([None] * (end - index))
        index = end
    return outcomes


def _translate(error: BaseException) -> _Failure:
    text = str(error).lower()
    if isinstance(error, sa.exc.OperationalError):
        if "disk is full" in text or "no space left" in text:
            return _Failure(OutOfSpace("the server's disk is full: free space in its data directory, then try again"))
        if "locked" in text or "connect" in text or error.connection_invalidated:
            return _Failure(Unavailable("the database is away for a moment; the request was not carried out"))
    if isinstance(error, OSError) and getattr(error, "errno", None) == 28:
        return _Failure(OutOfSpace("the server's disk is full: free space in its data directory, then try again"))
    return _Failure(error)


def _resolve(jobs: list[_Job], outcomes: list[Any]) -> None:
    """Hand the outcomes to the event loops that wait for them, one wake-up a loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future, Any]]] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        by_loop.setdefault(job.future.get_loop(), []).append((job.future, outcome))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_results, pairs)
        except RuntimeError:
            log.warning("an event loop closed before %d of its writes were acknowledged", len(pairs))


def _set_results(pairs: list[tuple[asyncio.Future, Any]]) -> None:
    for future, outcome in pairs:
        if future.done():
            continue
        if isinstance(outcome, _Failure):
            future.set_exception(outcome.error)
        else:
            future.set_result(outcome)


def make_engine(url: str) -> sa.Engine:
    if not url.startswith("sqlite"):
        patience = {name: value for name, value in POSTGRESQL_PATIENCE.items() if name not in sa.make_url(url).query}
        return sa.create_engine(url, pool_size=MAX_READERS + 1, pool_pre_ping=True, connect_args=patience)
    engine = sa.create_engine(
        url, pool_size=MAX_READERS + 1, connect_args={"check_same_thread": False, "timeout": 10}, poolclass=sa.QueuePool
    )

    @sa.event.listens_for(engine, "connect")
    def _configure(dbapi_connection: sqlite3.Connection, _record) -> None:
        dbapi_connection.isolation_level = None  # we say BEGIN ourselves, below
        cursor = dbapi_connection.cursor()
        # WAL with synchronous=NORMAL survives the death of any process; a power cut may lose the last moments
        # but never corrupts (https://sqlite.org/wal.html).
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "cache_size=-32000"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Readers take a snapshot. A writer takes its lock at once, and so waits for another process's writer
        # (`aeolian token` beside the server) instead of failing half-way.
        is_writer = connection.get_execution_options().get("is_writer")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")

    return engine
