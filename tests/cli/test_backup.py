import contextlib
import os
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from aeolian.cli import archive, backup
from aeolian.cli.archive import ArchiveWriter
from aeolian.cli.main import main
from aeolian.cli.settings import Settings, create_folders, save
from aeolian.domain.containers import MountFile
from aeolian.domain.volumes import EntryKind
from aeolian.storage import calls, migrate, mounts, volumes
from aeolian.storage.database import make_engine
from aeolian.storage.files import ContentStore


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A data directory with something of everything."""
    data_dir = tmp_path / "data"
    create_folders(data_dir)
    settings = Settings(data_dir=data_dir, grpc_port=1, http_port=2, grpc_url="", http_url="")
    save(settings)
    migrate.upgrade(settings.database)
    (settings.keys_dir / "secrets").write_bytes(b"k" * 32)
    (settings.keys_dir / "secrets").chmod(0o600)
    return settings


def run(*argv: str, ok: bool = True) -> str:
    done = CliRunner().invoke(main, list(argv))
    assert (done.exit_code == 0) == ok, done.output
    return done.output


def names_in(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def refer_to(settings: Settings, blob_id: str) -> None:
    engine = make_engine(settings.database)
    with engine.begin() as connection:
        connection.execute(calls.blobs.insert(), {"call_id": "fc-1", "blob_id": blob_id})
    engine.dispose()


def put_blob(settings: Settings, blob_id: str) -> Path:
    path = settings.blobs_dir / blob_id[-2:] / blob_id
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"large")
    return path


def test_a_backup_is_one_private_file_with_the_database_the_keys_and_what_they_need(settings, tmp_path):
    blob_id = "bl-" + "a" * 22
    refer_to(settings, blob_id)
    put_blob(settings, blob_id)
    put_blob(settings, "bl-" + "b" * 22)
    output = run("backup", str(tmp_path), "--data-dir", str(settings.data_dir))
    [made] = tmp_path.glob("aeolian-*.tar")
    assert str(made) in output and made.stat().st_mode & 0o777 == 0o600
    names = names_in(made)
    assert names[0] == archive.ABOUT and names[-1] == "aeolian.db"
    assert "keys/secrets" in names and f"blobs/aa/{blob_id}" in names
    assert not any("bbbb" in name or name.startswith("run") for name in names)
    run("backup", str(made), "--data-dir", str(settings.data_dir), ok=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [made.name, "data"]


def test_a_restored_data_directory_is_as_it_was(settings, tmp_path):
    blob_id = "bl-" + "a" * 22
    refer_to(settings, blob_id)
    put_blob(settings, blob_id)
    layer = settings.layers_dir / "empty" / "folder"
    layer.mkdir(parents=True)
    (layer / "file").write_bytes(b"content")
    os.link(layer / "file", layer / "same")
    os.symlink("/nowhere", layer / "link")
    os.utime(layer / "file", ns=(1, 1_234_567_890_123_456_789))
    with contextlib.suppress(OSError):  # some file systems have none
        os.setxattr(layer / "file", "user.kind", b"\xff\0binary")
    attributes = {name: os.getxattr(layer / "file", name) for name in os.listxattr(layer / "file")}
    os.chmod(layer / "file", 0o4755)
    os.chmod(layer, 0o555)
    run("backup", str(tmp_path / "b.tar"), "--data-dir", str(settings.data_dir))
    target = tmp_path / "new"
    assert f"restored to {target}" in run("restore", str(tmp_path / "b.tar"), "--data-dir", str(target))
    restored = target / "layers/empty/folder"
    assert (restored / "file").read_bytes() == b"content"
    assert (restored / "file").stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert (restored / "file").stat().st_ino == (restored / "same").stat().st_ino
    assert (restored / "file").stat().st_mode & 0o7777 == 0o4755 and restored.stat().st_mode & 0o777 == 0o555
    assert {name: os.getxattr(restored / "file", name) for name in os.listxattr(restored / "file")} == attributes
    assert os.readlink(restored / "link") == "/nowhere"
    assert (target / "keys/secrets").stat().st_mode & 0o777 == 0o600
    assert (target / "blobs/aa" / blob_id).read_bytes() == b"large"
    migrate.upgrade(f"sqlite:///{target / 'aeolian.db'}")


def test_what_was_deleted_while_it_was_copied_is_not_missed_by_a_newer_copy(settings, tmp_path, monkeypatch):
    gone, new = "bl-" + "a" * 22, "bl-" + "b" * 22
    refer_to(settings, gone)
    put_blob(settings, gone)
    referred_to, rounds = backup.referred_to, []

    def delete_meanwhile(*arguments):
        found = referred_to(*arguments)
        if not rounds:
            (settings.blobs_dir / "aa" / gone).unlink()
            engine = make_engine(settings.database)
            with engine.begin() as connection:
                connection.execute(calls.blobs.delete())
            engine.dispose()
            put_blob(settings, new)
            refer_to(settings, new)
        rounds.append(found)
        return found

    monkeypatch.setattr(backup, "referred_to", delete_meanwhile)
    output = run("backup", str(tmp_path / "b.tar"), "--data-dir", str(settings.data_dir))
    assert "missing" not in output and len(rounds) == 2
    assert f"blobs/bb/{new}" in names_in(tmp_path / "b.tar")


def test_what_the_disk_has_lost_is_named_and_the_rest_is_backed_up(settings, tmp_path):
    refer_to(settings, "bl-" + "a" * 22)
    output = run("backup", str(tmp_path / "b.tar"), "--data-dir", str(settings.data_dir))
    assert "missing on the disk, and so in the backup: blobs/aa/bl-aaa" in output
    assert (tmp_path / "b.tar").exists()


def test_the_content_of_mounts_and_volumes_is_referred_to(settings):
    content = ContentStore(settings.content_dir)
    digest = content.put(b"of a mount")
    file = MountFile("/a", digest, 10)
    entry = {"volume_id": "vo-1", "path": "a.txt", "parent": "", "kind": EntryKind.FILE, "mode": 0o644, "mtime_ns": 0}
    entry |= {"size_bytes": 3, "content": f"s{'1' * 64}", "version": 1}
    engine = make_engine(settings.database)
    with engine.begin() as connection:
        mounts.insert_mount(connection, mounts.MountRow("mo-1", "x", (file,)), 0.0)
        connection.execute(volumes.volume_entries.insert(), entry)
    engine.dispose()
    volume_files = backup.VolumeFiles(settings.volumes_dir / "content")
    found = backup.referred_to(settings.data_dir / "aeolian.db", content, volume_files, settings.data_dir)
    assert found == {f"content/{digest[:2]}/{digest[2:]}", f"volumes/content/11/s{'1' * 64}"}


def test_a_backup_that_fails_leaves_no_file(settings, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device", str(tmp_path / "b.tar.partial"))

    monkeypatch.setattr(ArchiveWriter, "add_tree", fail)
    output = run("backup", str(tmp_path / "b.tar"), "--data-dir", str(settings.data_dir), ok=False)
    assert "the disk" in output and "is full" in output
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_directory_that_is_used_is_not_restored_into(settings, tmp_path):
    run("backup", str(tmp_path / "b.tar"), "--data-dir", str(settings.data_dir))
    output = run("restore", str(tmp_path / "b.tar"), "--data-dir", str(settings.data_dir), ok=False)
    assert "is not empty (aeolian.db is there)" in output


@pytest.mark.parametrize("size", [0, 100, 4000, -30_000])
def test_what_is_no_whole_backup_is_refused_and_leaves_nothing(settings, tmp_path, size):
    path = tmp_path / "b.tar"
    run("backup", str(path), "--data-dir", str(settings.data_dir))
    path.write_bytes(path.read_bytes()[:size])
    output = run("restore", str(path), "--data-dir", str(tmp_path / "new"), ok=False)
    assert "is not a whole backup" in output or "is cut off" in output or "is not a backup" in output
    assert not (tmp_path / "new").exists() or [p.name for p in (tmp_path / "new").iterdir()] == ["run"]


def test_a_backup_of_a_newer_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(migrate, "head_revision", lambda: "9999")
    with ArchiveWriter(tmp_path / "b.tar", has_images=True, on_bytes=lambda num_bytes: None):
        pass
    monkeypatch.undo()
    output = run("restore", str(tmp_path / "b.tar"), "--data-dir", str(tmp_path / "new"), ok=False)
    assert "schema 9999" in output and "newer one" in output


def test_a_missing_backup_is_said_to_be_missing(tmp_path):
    output = run("restore", str(tmp_path / "no.tar"), "--data-dir", str(tmp_path / "new"), ok=False)
    assert "there is no backup at" in output
