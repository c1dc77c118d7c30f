import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from aeolian.cli.data_lock import DataLock
from aeolian.cli.main import main
from aeolian.cli.settings import Settings, create_folders, save
from aeolian.domain.calls import Status
from aeolian.domain.link import LogLine
from aeolian.domain.logs import LogBatch
from aeolian.storage import images, logs, migrate
from aeolian.storage.database import make_engine
from aeolian.storage.images import Image
from aeolian.worker.images.store import ImageStore, StoredImage

YEAR_S = 365 * 86400.0


def an_image(image_id: str, at: float) -> Image:
    values = {"recipe": image_id, "is_current": True, "becomes_current": False, "workspace": "local"}
    values |= {"builder_version": "2025.06", "base_image_ids": (), "function_id": "", "app_id": "ap-1"}
    return Image(image_id, **values, build_id=f"ta-{image_id}", status=Status.SUCCESS, created_at=at)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An image that was used now and one a year ago, over one common layer and one of their own each; old logs."""
    data_dir = tmp_path / "data"
    create_folders(data_dir)
    settings = Settings(data_dir=data_dir, grpc_port=1, http_port=2, grpc_url="", http_url="")
    save(settings)
    migrate.upgrade(settings.database)
    now, store = time.time(), ImageStore(data_dir)
    engine = make_engine(settings.database)
    with engine.begin() as connection:
        for name, at in (("im-new", now), ("im-old", now - YEAR_S)):
            images.insert(connection, an_image(name, at), b"")
            store.put(StoredImage(name, layers=("common", f"of-{name}")))
        line = (LogLine(1, now - YEAR_S, "long ago\n"),)
        batch = LogBatch("ap-1", 1, 1, "ta-1", "fu-1", "fu-1", "", line, is_end=False, at=now - YEAR_S)
        logs.insert_batches(connection, [batch], {})
    engine.dispose()
    for layer in ("common", "of-im-new", "of-im-old", "of-no-image", "of-a-build-that-failed-lately"):
        (settings.layers_dir / layer).mkdir()
        (settings.layers_dir / layer / "file").write_bytes(bytes(5000))
        store.remember(f"key-{layer}", layer)
        if "lately" not in layer:
            os.utime(settings.layers_dir / ".made" / f"key-{layer}", (0, 0))
    return settings


def run(settings: Settings, *options: str, ok: bool = True) -> str:
    done = CliRunner().invoke(main, ["gc", "--data-dir", str(settings.data_dir), *options])
    assert (done.exit_code == 0) == ok, done.output
    return done.output


def layers(settings: Settings) -> set[str]:
    return {path.name for path in settings.layers_dir.iterdir() if not path.name.startswith(".")}


def test_without_being_told_to_delete_it_only_shows_what_it_would(settings):
    before = layers(settings)
    output = run(settings)
    assert "found 1 pieces" in output and "found 1, with 2 layers" in output and "im-old" in output
    assert "Nothing was deleted" in output
    assert layers(settings) == before


def test_what_nothing_uses_goes_and_all_else_stays(settings):
    assert "deleted 1, with 2 layers" in run(settings, "--delete")
    assert layers(settings) == {"empty", "common", "of-im-new", "of-a-build-that-failed-lately"}
    assert ImageStore(settings.data_dir).ids() == ["im-new"]
    output = run(settings)
    assert "found 0 pieces" in output and "found 0, with 0 layers" in output


def test_ages_can_be_chosen(settings):
    output = run(settings, "--images-unused-for", "400", "--logs-older-than", "400")
    assert "found 0 pieces" in output and "found 0, with 1 layers" in output


def test_images_stay_while_aeolian_runs(settings):
    lock = DataLock(settings.run_dir)
    lock.acquire()
    try:
        output = run(settings, "--delete", ok=False)
    finally:
        lock.release()
    assert "images can be deleted only while nothing runs" in output and "deleted 1 pieces" in output
    assert "of-im-old" in layers(settings)


def test_an_image_that_its_user_has_deleted_leaves_the_disk(settings):
    engine = make_engine(settings.database)
    with engine.begin() as connection:
        images.delete(connection, "im-new")
    engine.dispose()
    run(settings, "--delete")
    assert ImageStore(settings.data_dir).ids() == []
