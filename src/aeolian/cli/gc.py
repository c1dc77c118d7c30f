"""`aeolian gc`: gives back the space of old logs and unused images.

A running server deletes old logs, and what no call, Volume or Mount refers to, by itself. Images go only while
nothing runs, since server and worker know them by heart.
"""

import asyncio
import time
from pathlib import Path

import click

from aeolian.cli.data_lock import DataLock
from aeolian.cli.open_database import open_database
from aeolian.cli.settings import Settings, load_of
from aeolian.cli.status_report import bytes_below
from aeolian.cli.tables import byte_count, console, table
from aeolian.control.unused_images import unused_since
from aeolian.domain.errors import FailedPrecondition
from aeolian.storage import apps, images, logs
from aeolian.storage.database import Database
from aeolian.worker.images.store import ImageStore

DAY_S = 86400.0
PORTION = 500


@click.command()
@click.option(
    "--logs-older-than", "log_days", type=click.FloatRange(0), default=30.0, show_default=True, metavar="DAYS"
)
@click.option(
    "--images-unused-for", "image_days", type=click.FloatRange(0), default=30.0, show_default=True, metavar="DAYS"
)
@click.option("--delete", "is_meant", is_flag=True, help="Delete them. Without it, they are only shown.")
@click.pass_obj
def gc(data_dir: Path, log_days: float, image_days: float, is_meant: bool) -> None:
    """Show, or delete, old logs of apps and images that nothing has used for long."""
    settings, now = load_of(data_dir), time.time()
    database = open_database(settings)
    try:
        asyncio.run(_logs(database, now - log_days * DAY_S, log_days, is_meant))
        _images(settings, database, now - image_days * DAY_S, image_days, is_meant)
    finally:
        database.engine.dispose()
    if not is_meant:
        click.echo("Nothing was deleted: --delete does it.")


async def _logs(database: Database, before: float, days: float, is_meant: bool) -> None:
    living = {app.app_id for app in database.read_now(apps.list_living)}
    num_pieces = num_bytes = 0
    if is_meant:
        database.open()
    for app_id in database.read_now(logs.app_ids):
        which = {"app_id": app_id, "before": before, "keep_last": app_id in living}
        num, size = database.read_now(lambda c, which=which: logs.count_older(c, **which))
        num_pieces, num_bytes = num_pieces + num, num_bytes + size
        while is_meant and await database.write(lambda c, which=which: logs.delete_older(c, **which, limit=PORTION)):
            pass
    if is_meant:
        await database.close()
    done = "deleted" if is_meant else "found"
    click.echo(f"Logs older than {days:g} days: {done} {num_pieces} pieces, {byte_count(num_bytes)}.")


def _images(settings: Settings, database: Database, before: float, days: float, is_meant: bool) -> None:
    store = ImageStore(settings.data_dir)
    lock = DataLock(settings.run_dir)
    if is_meant:
        try:
            lock.acquire()
        except FailedPrecondition as error:
            raise FailedPrecondition(f"images can be deleted only while nothing runs: {error.message}") from error
    try:
        unused = database.read_now(lambda connection: unused_since(connection, before))
        known = {image.image_id for image in database.read_now(images.list_all)}
        image_ids = [image.image_id for image, _ in unused]
        image_ids += [image_id for image_id in store.ids() if image_id not in known]  # users have deleted them
        layers = store.unused_layers(before, without=image_ids)
        device, seen = settings.layers_dir.stat().st_dev, set[int]()
        num_bytes = sum(bytes_below(settings.layers_dir / layer, device, seen) for layer in layers)
        if unused and not is_meant:
            rows = table("image", "used last", whole=("image",))
            for image, used_at in unused:
                rows.add_row(image.image_id, time.strftime("%Y-%m-%d", time.localtime(used_at)))
            console().print(rows)
        if is_meant:
            _delete(database, store, image_ids, layers)
    finally:
        if is_meant:
            lock.release()
    done = "deleted" if is_meant else "found"
    click.echo(
        f"Images unused for {days:g} days: {done} {len(image_ids)}, "
        f"with {len(layers)} layers of {byte_count(num_bytes)} that no other image needs."
    )


def _delete(database: Database, store: ImageStore, image_ids: list[str], layers: list[str]) -> None:
    """The database forgets them first: an image that it does not know is built again."""
    with database.engine.connect().execution_options(is_writer=True) as connection, connection.begin():
        for image_id in image_ids:
            images.delete(connection, image_id)
    for image_id in image_ids:
        store.delete(image_id)
    store.delete_layers(layers)
    if database.engine.dialect.name == "sqlite":
        with database.engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.execute("VACUUM")
