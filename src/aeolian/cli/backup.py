"""`aeolian backup`: everything that a data directory holds, in one file, while Aeolian runs.

The database is copied at one moment, then the files that this copy refers to. Files never change once they are named;
one that was deleted in between makes another round, with a newer copy.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import msgspec
import sqlalchemy as sa

from aeolian.cli.archive import DATABASE, ArchiveWriter
from aeolian.cli.open_database import open_database
from aeolian.cli.settings import Settings, load_of
from aeolian.cli.tables import byte_count
from aeolian.domain.errors import AlreadyExists, InvalidArgument
from aeolian.storage import calls, copying, mounts, volumes
from aeolian.storage.database import make_engine
from aeolian.storage.files import ContentStore
from aeolian.storage.volume_files import VolumeFiles
from aeolian.worker.images.store import EMPTY_LAYER, StoredImage

MAX_ROUNDS = 5
SHOW_EVERY_S = 0.5


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--without-images", is_flag=True, help="Leave images out: they are built again where they are needed.")
@click.pass_obj
def backup(data_dir: Path, target: Path, without_images: bool) -> None:
    """Write everything to the file TARGET, or to a new file in the folder TARGET. Aeolian may run meanwhile."""
    settings = load_of(data_dir)
    if target.is_dir():
        target = target / time.strftime("aeolian-%Y%m%d-%H%M%S.tar")
    if target.exists():
        raise AlreadyExists(f"{target} exists: name another file, or delete it first")
    if not target.parent.is_dir():
        raise InvalidArgument(f"there is no folder {target.parent}: make it first")
    progress = Progress("backed up")
    missing = write(settings, target.absolute(), has_images=not without_images, on_bytes=progress.add)
    progress.end()
    for name in sorted(missing)[:20]:
        click.echo(f"missing on the disk, and so in the backup: {name}", err=True)
    click.echo(f"{target} ({byte_count(target.stat().st_size)}): keep it safe, it holds the keys")


def write(settings: Settings, target: Path, *, has_images: bool, on_bytes: Callable[[int], None]) -> set[str]:
    """Make the backup. Returns what the database refers to and the disk has not.

    Raises FailedPrecondition and Unavailable as `open_database`.
    """
    content, volume_files = ContentStore(settings.content_dir), VolumeFiles(settings.volumes_dir / "content")
    database = open_database(settings, read_only=True)
    added: set[str] = set()
    missing: set[str] = set()
    with contextlib.ExitStack() as stack:
        stack.callback(database.engine.dispose)
        stack.enter_context(volume_files.nothing_deleted())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".aeolian-backup-", dir=target.parent)))
        archive = stack.enter_context(ArchiveWriter(target, has_images=has_images, on_bytes=on_bytes))
        for number in range(MAX_ROUNDS):
            copy = folder / f"{number}.db"
            copying.copy_to_file(database.engine, copy)
            before, missing = missing, set()
            for name in referred_to(copy, content, volume_files, settings.data_dir):
                if name not in added:
                    (added if archive.add(settings.data_dir / name, name) else missing).add(name)
            if missing <= before:
                break  # not deleted meanwhile, but gone for longer
        archive.add_tree(settings.keys_dir, "keys")
        archive.add_tree(settings.sdk_dir, "sdk")
        if has_images:
            _add_images(archive, settings)
        archive.add(copy, DATABASE)
    return missing


def referred_to(database: Path, content: ContentStore, volume_files: VolumeFiles, data_dir: Path) -> set[str]:
    """Files that a copy of the database refers to, relative to the data directory."""
    engine = make_engine(f"sqlite:///{database}")
    try:
        with engine.connect() as connection:
            paths = [content.path(digest) for digest in mounts.referenced_contents(connection)]
            paths += [volume_files.path(name) for name in volumes.referenced_contents(connection)]
            blob_ids = connection.execute(sa.select(calls.blobs.c.blob_id).distinct()).scalars()
            paths += [data_dir / "blobs" / blob_id[-2:] / blob_id for blob_id in blob_ids]
    finally:
        engine.dispose()
    return {str(path.relative_to(data_dir)) for path in paths}


def _add_images(archive: ArchiveWriter, settings: Settings) -> None:
    """Images with their layers. One that is deleted meanwhile is left out: it can be built again."""
    layers: set[str] = set()
    for path in sorted(settings.images_dir.glob("im-*.json")):
        with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
            layers.update(msgspec.json.decode(path.read_bytes(), type=StoredImage).layers)
    for layer in sorted({EMPTY_LAYER, *layers}):
        archive.add_tree(settings.layers_dir / layer, f"layers/{layer}")
    archive.add_tree(settings.layers_dir / ".made", "layers/.made")
    archive.add_tree(settings.images_dir, "images")


class Progress:
    """How many bytes, on a line that changes where somebody watches."""

    def __init__(self, verb: str):
        self._verb = verb
        self._num_bytes = 0
        self._shown_at = 0.0
        self._is_watched = sys.stderr.isatty()

    def add(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._is_watched and time.monotonic() - self._shown_at >= SHOW_EVERY_S:
            self._shown_at = time.monotonic()
            click.echo(f"\r{self._verb} {byte_count(self._num_bytes)} ", nl=False, err=True)

    def end(self) -> None:
        if self._shown_at:
            click.echo(f"\r{self._verb} {byte_count(self._num_bytes)} ", err=True)
