"""What a data directory holds and what runs on it, read from its files and its database.

Nothing is asked of the server, so it works whether or not that runs.
"""

import os
import shutil
from pathlib import Path

import msgspec
import psutil
from sqlalchemy.engine import Connection

from aeolian import __version__
from aeolian.cli.data_lock import DataLock
from aeolian.cli.open_database import open_database
from aeolian.cli.settings import Settings
from aeolian.cli.supervisor import ChildRecord
from aeolian.domain.apps import App
from aeolian.domain.containers import HookTiming
from aeolian.storage import apps, containers, functions, schedules, volumes


class ProcessStatus(msgspec.Struct, frozen=True):
    """One of the processes that `aeolian up` keeps running."""

    name: str
    pid: int
    started_at: float
    memory_bytes: int


class AppStatus(msgspec.Struct, frozen=True):
    """An App that has not ended."""

    app_id: str
    name: str
    state: str
    environment_name: str
    version: int
    num_containers: int


class ContainerStatus(msgspec.Struct, frozen=True):
    """A container, running or ended. Times are epoch seconds; 0 = has not happened."""

    task_id: str
    app_name: str
    function_name: str
    enqueued_at: float
    started_at: float
    """When it first asked for inputs."""
    finished_at: float
    exit_code: int
    reason: str
    hooks: tuple[HookTiming, ...]
    """What its start consisted of, in order."""


class ScheduleStatus(msgspec.Struct, frozen=True):
    """A Function of a deployed App that runs by itself."""

    app_name: str
    function_name: str
    schedule: str
    next_at: float
    """When it runs at next (epoch seconds)."""


class Report(msgspec.Struct, frozen=True):
    version: str
    data_dir: str
    grpc_url: str
    http_url: str
    runtime: str
    """What containers run in; what was asked for (`auto`) before a worker has taken one."""
    supervisor_pid: int
    """0: `aeolian up` does not run."""
    processes: tuple[ProcessStatus, ...]
    apps: tuple[AppStatus, ...]
    schedules: tuple[ScheduleStatus, ...]
    """The one that runs first comes first."""
    starts: tuple[ContainerStatus, ...]
    """The latest containers, the newest first."""
    num_running: int
    num_volumes: int
    disk_bytes: dict[str, int]
    """What each entry of the data directory takes on disk."""
    disk_free_bytes: int


def report(settings: Settings, num_starts: int) -> Report:
    """Raises FailedPrecondition when there is no database of this version yet."""
    holder = DataLock(settings.run_dir).holder or 0
    database = open_database(settings, read_only=True)
    try:
        return Report(
            version=__version__,
            data_dir=str(settings.data_dir),
            grpc_url=settings.grpc_url,
            http_url=settings.http_url,
            runtime=_runtime(settings),
            supervisor_pid=holder,
            processes=_processes(settings.run_dir / "processes.json") if holder else (),
            disk_bytes=_disk_use(settings.data_dir),
            disk_free_bytes=shutil.disk_usage(settings.data_dir).free,
            **database.read_now(lambda connection: _read(connection, num_starts)),
        )
    finally:
        database.engine.dispose()


def _read(connection: Connection, num_starts: int) -> dict:
    living = apps.list_living(connection)
    running = containers.unfinished(connection)
    latest = containers.latest(connection, num_starts)
    scheduled = schedules.list_all(connection)
    function_names = functions.names_of(connection, {row.function_id for row in (*latest, *scheduled)})
    known = {app.app_id: app for app in living}
    for app_id in {row.app_id for row in latest} - known.keys():
        if (app := apps.get_app(connection, app_id)) is not None:
            known[app_id] = app
    app_status = [
        AppStatus(
            app.app_id,
            name=_name(app),
            state=app.state.value,
            environment_name=app.environment_name,
            version=app.version,
            num_containers=sum(row.app_id == app.app_id for row in running),
        )
        for app in living
    ]
    starts = [
        ContainerStatus(
            row.task_id,
            app_name=_name(known[row.app_id]) if row.app_id in known else row.app_id,
            function_name=function_names.get(row.function_id, row.function_id),
            enqueued_at=row.enqueued_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            exit_code=row.exit_code,
            reason=row.reason,
            hooks=msgspec.msgpack.decode(row.hooks, type=tuple[HookTiming, ...]) if row.hooks else (),
        )
        for row in latest
    ]
    schedule_status = [
        ScheduleStatus(
            app_name=_name(known[function.app_id]),
            function_name=function_names.get(function.function_id, function.function_id),
            schedule=str(function.schedule),
            next_at=function.next_at,
        )
        for function in scheduled
        if function.app_id in known
    ]
    return {
        "apps": tuple(app_status),
        "schedules": tuple(schedule_status),
        "starts": tuple(starts),
        "num_running": len(running),
        "num_volumes": volumes.count(connection),
    }


def _name(app: App) -> str:
    return app.name or app.description or app.app_id


def _runtime(settings: Settings) -> str:
    try:
        return settings.runtime_path.read_text()
    except FileNotFoundError:
        return settings.runtime


def _processes(record_path: Path) -> tuple[ProcessStatus, ...]:
    """Those that the supervisor has written down and that are alive."""
    try:
        records = msgspec.json.decode(record_path.read_bytes(), type=list[ChildRecord])
    except (OSError, msgspec.MsgspecError):
        return ()
    found = []
    for record in records:
        try:
            process = psutil.Process(record.pid)
            if abs(process.create_time() - record.created_at) < 0.5:
                found.append(ProcessStatus(record.name, record.pid, record.created_at, process.memory_info().rss))
        except psutil.Error:
            continue
    return tuple(found)


def _disk_use(data_dir: Path) -> dict[str, int]:
    """By entry of the data directory. What is mounted below it belongs to containers and is not counted again."""
    device, seen = data_dir.stat().st_dev, set[int]()
    return {path.name: bytes_below(path, device, seen) for path in sorted(data_dir.iterdir())}


def bytes_below(path: Path, device: int, seen: set[int]) -> int:
    """Blocks on `device`, each hard-linked file once; what disappears meanwhile counts nothing."""
    try:
        about = path.lstat()
        if about.st_dev != device or about.st_ino in seen:
            return 0
        seen.add(about.st_ino)
        total = about.st_blocks * 512
        if path.is_dir() and not path.is_symlink():
            with os.scandir(path) as entries:
                total += sum(bytes_below(Path(entry.path), device, seen) for entry in entries)
        return total
    except OSError:
        return 0
