"""`aeolian restore`: a new data directory of a backup."""

import shutil
from pathlib import Path

import click

from aeolian.cli import archive
from aeolian.cli.archive import DATABASE
from aeolian.cli.backup import Progress
from aeolian.cli.data_lock import DataLock
from aeolian.cli.settings import create_folders
from aeolian.domain.errors import FailedPrecondition
from aeolian.storage import copying, migrate


@click.command()
@click.argument("backup", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--database", "database_url", default="", metavar="URL", help="An empty PostgreSQL database to fill.")
@click.pass_obj
def restore(data_dir: Path, backup: Path, database_url: str) -> None:
    """Make a data directory of the file BACKUP. `aeolian up` then goes on from there."""
    data_dir = data_dir.expanduser().absolute()
    if database_url:
        migrate.normalized(database_url)
    progress = Progress("restored")
    with archive.opened(backup) as (about, tar):
        if there := _used_for(data_dir):
            raise FailedPrecondition(f"{data_dir} is not empty ({there} is there): name a new one with --data-dir")
        if database_url:
            copying.check_empty(database_url)
        create_folders(data_dir)
        lock = DataLock(data_dir / "run")
        lock.acquire()
        try:
            archive.extract(tar, data_dir, progress.add)
            if not (data_dir / DATABASE).exists():
                raise FailedPrecondition(f"{backup} is cut off: it has no database. Use another backup")
            if database_url:
                copying.copy_from_file(data_dir / DATABASE, database_url)
                (data_dir / DATABASE).unlink()
        except BaseException:
            _empty(data_dir)
            raise
        finally:
            lock.release()
    progress.end()
    more = f" --database {migrate.shown(database_url)}" if database_url else ""
    click.echo(f"restored to {data_dir}. Start it: aeolian up --data-dir {data_dir}{more}")
    if not about.has_images:
        click.echo("Images are not in this backup: deploy apps again, so that they are built.")


def _used_for(data_dir: Path) -> str:
    """The name of something in it; "" when it can be taken."""
    if not data_dir.exists():
        return ""
    return next((path.name for path in sorted(data_dir.iterdir()) if path.name not in ("run", "lost+found")), "")


def _empty(data_dir: Path) -> None:
    """What a restore that failed has made goes, so that it can be tried again."""
    for path in data_dir.iterdir():
        if path.name in ("run", "lost+found"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
