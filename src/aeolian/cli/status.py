"""`aeolian status`: shows what a data directory holds, what runs on it, and what container starts cost."""

import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import click
import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aeolian.cli.settings import load_of
from aeolian.cli.status_report import AppStatus, ContainerStatus, ProcessStatus, Report, ScheduleStatus, report
from aeolian.cli.tables import byte_count, console, table


@click.command()
@click.option(
    "--starts", "num_starts", type=click.IntRange(0), default=8, show_default=True, metavar="N", help="How many."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.pass_obj
def status(data_dir: Path, num_starts: int, as_json: bool) -> None:
    """Show what runs, what is kept, and what starts cost."""
    found = report(load_of(data_dir), num_starts)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)))
    else:
        console().print(page(found, time.time()))


def page(found: Report, now: float) -> RenderableType:
    blocks: list[RenderableType] = [_summary(found, now)]
    if found.processes:
        blocks += ["", _heading("Processes"), _processes(found.processes, now)]
    if found.apps:
        blocks += ["", _heading("Apps"), _apps(found.apps)]
    if found.schedules:
        blocks += ["", _heading("What runs next by itself"), _schedules(found.schedules, now)]
    if found.starts:
        blocks += ["", _heading("Latest container starts, ms"), starts_table(found.starts)]
    return Group(*blocks)


def starts_table(starts: Iterable[ContainerStatus]) -> Table:
    """A row for each container: what each step of its start took, in milliseconds, and its median over all.

    `total` runs from the decision to start it to its first question for inputs.
    """
    starts = list(starts)
    names = list(dict.fromkeys(hook.name for start in starts for hook in start.hooks))
    columns = ("container", "function", *names, "total", "state")
    rows = table(*columns, whole=("container",), numbers=[*names, "total"])
    for start in starts:
        took = {hook.name: hook.seconds for hook in start.hooks}
        rows.add_row(
            start.task_id,
            f"{start.app_name}.{start.function_name.removesuffix('.*')}",
            *(_ms(took.get(name)) for name in names),
            _ms(_total_s(start)),
            _state(start),
        )
    if len(starts) > 1:
        rows.add_section()
        times = [[hook.seconds for start in starts for hook in start.hooks if hook.name == name] for name in names]
        totals = [total for start in starts if (total := _total_s(start)) is not None]
        medians = [_ms(statistics.median(column)) if column else "" for column in [*times, totals]]
        rows.add_row("median", "", *medians, "", style="bold")
    return rows


def _summary(found: Report, now: float) -> Table:
    rows = table("what", "how", show_header=False)
    started = min((process.started_at for process in found.processes), default=now)
    running = f"running for {_duration(now - started)} (process {found.supervisor_pid})"
    rows.add_row(f"Aeolian {found.version}", running if found.supervisor_pid else "not running")
    if found.supervisor_pid:
        rows.add_row("clients", found.grpc_url)
        rows.add_row("web", found.http_url)
    rows.add_row("runtime", found.runtime)
    rows.add_row("data", found.data_dir)
    sizes = sorted(found.disk_bytes.items(), key=lambda item: -item[1])
    largest = ", ".join(f"{name} {byte_count(size)}" for name, size in sizes[:5] if size >= 1 << 20)
    used = byte_count(sum(found.disk_bytes.values()))
    rows.add_row("disk", f"{used} used{f' ({largest})' if largest else ''}, {byte_count(found.disk_free_bytes)} free")
    counts = ((found.num_running, "container"), (len(found.apps), "app"), (found.num_volumes, "volume"))
    rows.add_row("now", ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts))
    return rows


def _processes(processes: Iterable[ProcessStatus], now: float) -> Table:
    rows = table("name", "process", "running for", "memory", numbers=["process", "memory"])
    for process in processes:
        since = _duration(now - process.started_at)
        rows.add_row(process.name, str(process.pid), since, byte_count(process.memory_bytes))
    return rows


def _apps(apps: Iterable[AppStatus]) -> Table:
    columns = ("app", "id", "environment", "state", "version", "containers")
    rows = table(*columns, whole=("id",), numbers=("version", "containers"))
    for app in apps:
        state = app.state.replace("_", " ")
        rows.add_row(app.name, app.app_id, app.environment_name, state, str(app.version), str(app.num_containers))
    return rows


def _schedules(schedules: Iterable[ScheduleStatus], now: float) -> Table:
    rows = table("function", "schedule", "next run", "in")
    for function in schedules:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(function.next_at))
        name = f"{function.app_name}.{function.function_name}"
        rows.add_row(name, function.schedule, at, _duration(function.next_at - now))
    return rows


def _state(start: ContainerStatus) -> str:
    if not start.finished_at:
        return "running" if start.started_at else "starting"
    if start.started_at:
        return f"ended after {_duration(start.finished_at - start.started_at)}"
    return f"did not start: {start.reason or f'exit status {start.exit_code}'}"


def _total_s(start: ContainerStatus) -> float | None:
    return start.started_at - start.enqueued_at if start.started_at else None


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.0f}"


def _duration(seconds: float) -> str:
    """The largest unit of `90 s`, `12 min`, `5 h`, `3 d` that says enough."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s" if seconds >= 10 else f"{max(seconds, 0):.1f} s"
