"""`aeolian audit`: who changed what, and who was refused. Works on the database, whether or not the server runs."""

import datetime
import sys
from pathlib import Path

import click
import msgspec

from aeolian.cli import tables
from aeolian.cli.durations import duration_s
from aeolian.cli.people import People, with_people
from aeolian.cli.settings import load_of
from aeolian.domain.clock import SystemClock
from aeolian.storage.audit import AuditEntry


@click.command()
@click.option("--since", metavar="7d", help="Only what happened in this time. Default: all that is kept (a year).")
@click.option("--token", "of", default="", metavar="ID", help="Only of this token (or its name), or container.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=100, show_default=True, help="The latest so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def audit(data_dir: Path, since: str | None, of: str, limit: int, as_json: bool) -> None:
    """Show who changed what, and who was refused; the latest comes last."""
    began_at = SystemClock().now() - duration_s(since) if since else 0.0

    async def read(people: People) -> list[AuditEntry]:
        return await people.trail.entries(since=began_at, of=of, limit=limit)

    entries = with_people(load_of(data_dir), read)
    if as_json:
        for entry in entries:
            sys.stdout.write(msgspec.json.encode(entry).decode() + "\n")
        return
    rows = tables.table("time", "who", "did", "environment", "to", "result", whole=("time",))
    for entry in entries:
        at = datetime.datetime.fromtimestamp(entry.at).strftime("%Y-%m-%d %H:%M:%S")
        rows.add_row(at, entry.who, entry.action, entry.environment, entry.target, entry.result)
    tables.console().print(rows)
