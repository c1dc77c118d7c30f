"""Volumes in containers; a container is whoever writes into the folder that it would be shown."""

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aeolian.control.volume_commits import VolumeCommits
from aeolian.control.volumes import Volumes
from aeolian.domain.caller import Caller
from aeolian.domain.clock import SystemClock
from aeolian.domain.containers import ContainerSpec, VolumeMountSpec
from aeolian.domain.errors import FailedPrecondition, InvalidArgument, NotFound, OutOfSpace, Unavailable
from aeolian.domain.volumes import EntryKind, VolumeEntry
from aeolian.protocol.worker_volumes import WorkerVolumeCalls
from aeolian.storage.database import Database, metadata
from aeolian.storage.volume_files import VolumeFiles
from aeolian.worker import mounting, volume_changes
from aeolian.worker import volumes as module
from aeolian.worker.hooks.base import Start
from aeolian.worker.hooks.volumes import VolumesHook
from aeolian.worker.volume_authority import LinkedVolumeAuthority, changes_since
from aeolian.worker.volumes import WorkerVolumes

ME = Caller("local", token_id="ak-1")


class OneEnvironment:
    id, name = "en-1", "main"

    def resolve(self, name, caller):
        return self


class Node:
    """A server's volumes and one worker's, over the bytes that travel between them."""

    def __init__(self, root, overlays):
        self.root = root
        self.database = Database(f"sqlite:///{root}/test.db")
        metadata.create_all(self.database.engine)
        self.database.open()
        clock = SystemClock()
        self.files = VolumeFiles(root / "volumes/content")
        self.objects = Volumes(self.database, clock, OneEnvironment())
        self.commits = VolumeCommits(self.database, clock, self.files)
        self.calls = WorkerVolumeCalls(self.commits)
        self.is_away = False
        self.overlays = overlays
        self.worker = WorkerVolumes(root, LinkedVolumeAuthority(self.call), overlays=overlays)

    async def call(self, method, request):
        if self.is_away:
            raise Unavailable("away")
        return await self.calls.answer(method, request)

    async def volume(self, name="data") -> str:
        return (await self.objects.create(name, "", ME)).volume_id

    async def attach(self, task_id, volume_id, **options):
        return await self.worker.attach(task_id, VolumeMountSpec(volume_id, "/data", **options))

    async def listing(self, volume_id) -> dict[str, VolumeEntry]:
        return (await changes_since(self.commits, volume_id))[1]

    async def contents(self, volume_id) -> dict[str, bytes | str | None]:
        """Path -> bytes of a file, target of a link, None for a directory."""
        read = {
            EntryKind.FILE: lambda entry: self.files.path(entry.content).read_bytes(),
            EntryKind.SYMLINK: lambda entry: entry.content,
            EntryKind.DIRECTORY: lambda entry: None,
        }
        return {path: read[entry.kind](entry) for path, entry in (await self.listing(volume_id)).items()}


def can_mount(root) -> bool:
    return os.geteuid() == 0 and mounting.can_mount_overlays(root)


@pytest.fixture(params=["overlay", "plain"])
async def node(tmp_path, request, monkeypatch):
    monkeypatch.setattr(module, "BACKGROUND_COMMIT_S", 3600)
    if request.param == "overlay" and not can_mount(tmp_path):
        pytest.skip("overlays cannot be mounted here")
    node = Node(tmp_path, request.param == "overlay")
    await node.worker.open()
    try:
        yield node
    finally:
        node.is_away = False
        await node.worker.close()
        await node.database.close()
        assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


async def test_what_a_container_writes_is_committed_and_seen_by_the_next(node):
    volume = await node.volume()
    one = await node.attach("ta-1", volume)
    (one / "dir/deep").mkdir(parents=True)
    (one / "dir/deep/file").write_bytes(b"hello")
    (one / "empty").touch()
    (one / "script").write_bytes(b"#!/bin/sh")
    (one / "script").chmod(0o755)
    (one / "link").symlink_to("dir/deep/file")
    os.utime(one / "script", ns=(10**18, 10**18))
    await node.worker.commit("ta-1", volume)
    assert await node.contents(volume) == {
        "dir": None,
        "dir/deep": None,
        "dir/deep/file": b"hello",
        "empty": b"",
        "script": b"#!/bin/sh",
        "link": "dir/deep/file",
    }
    two = await node.attach("ta-2", volume)
    assert (two / "link").read_bytes() == b"hello"
    status = (two / "script").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o755, 10**18)


async def test_others_see_a_commit_when_they_reload_and_not_before(node):
    volume = await node.volume()
    one, two = await node.attach("ta-1", volume), await node.attach("ta-2", volume)
    (one / "a").write_bytes(b"1")
    await node.worker.commit("ta-1", volume)
    assert os.listdir(two) == []
    await node.worker.reload("ta-2", volume)
    assert (two / "a").read_bytes() == b"1"
    (two / "a").write_bytes(b"two")
    (two / "b").write_bytes(b"2")
    await node.worker.commit("ta-2", volume)
    assert (one / "a").read_bytes() == b"1"
    await node.worker.reload("ta-1", volume)
    assert ((one / "a").read_bytes(), (one / "b").read_bytes()) == (b"two", b"2")


async def test_concurrent_writers_merge_and_the_last_commit_of_a_file_wins(node):
    volume = await node.volume()
    one, two = await node.attach("ta-1", volume), await node.attach("ta-2", volume)
    (one / "shared").write_bytes(b"one" * 1000)
    (one / "of-one").write_bytes(b"1")
    (two / "shared").write_bytes(b"two" * 1000)
    (two / "of-two").write_bytes(b"2")
    await asyncio.gather(node.worker.commit("ta-1", volume), node.worker.commit("ta-2", volume))
    found = await node.contents(volume)
    assert (found.pop("of-one"), found.pop("of-two")) == (b"1", b"2")
    assert found["shared"] in (b"one" * 1000, b"two" * 1000)
    (one / "shared").write_bytes(b"last")
    await node.worker.commit("ta-1", volume)
    assert (await node.contents(volume))["shared"] == b"last"
    # What a container left as it was is not committed over somebody else's newer one.
    (two / "other").write_bytes(b"x")
    await node.worker.commit("ta-2", volume)
    assert (await node.contents(volume))["shared"] == b"last"
    assert (two / "shared").read_bytes() == b"last"


async def test_deletions_and_renames_are_committed(node):
    volume = await node.volume()
    first = await node.attach("ta-0", volume)
    for path in ("keep", "gone", "d/a", "d/e/b", "f/x", "f/y", "swap/inner"):
        (first / path).parent.mkdir(parents=True, exist_ok=True)
        (first / path).write_bytes(path.encode())
    await node.worker.commit("ta-0", volume)
    one = await node.attach("ta-1", volume)
    (one / "gone").unlink()
    (one / "d").rename(one / "moved")
    (one / "moved/e").rename(one / "e")
    (one / "moved/a").write_bytes(b"changed")
    shutil.rmtree(one / "f")
    (one / "f").mkdir()
    (one / "f/z").write_bytes(b"z")
    shutil.rmtree(one / "swap")
    (one / "swap").write_bytes(b"now a file")
    (one / "new").write_bytes(b"new")
    (one / "new").rename(one / "renamed")
    expected = {
        "keep": b"keep",
        "moved": None,
        "moved/a": b"changed",
        "e": None,
        "e/b": b"d/e/b",
        "f": None,
        "f/z": b"z",
        "swap": b"now a file",
        "renamed": b"new",
    }
    await node.worker.commit("ta-1", volume)
    assert await node.contents(volume) == expected
    version = (await node.objects.get(volume, ME)).version
    await node.worker.commit("ta-1", volume)
    assert (await node.objects.get(volume, ME)).version == version
    (one / "renamed").unlink()
    shutil.rmtree(one / "e")
    (one / "moved").rename(one / "again")
    await node.worker.commit("ta-1", volume)
    for path in ("renamed", "e", "e/b"):
        del expected[path]
    expected["again"], expected["again/a"] = expected.pop("moved"), expected.pop("moved/a")
    assert await node.contents(volume) == expected
    await node.worker.reload("ta-0", volume)
    assert sorted(os.listdir(first)) == ["again", "f", "keep", "swap"]
    assert (first / "again/a").read_bytes() == b"changed"
    assert os.listdir((await node.attach("ta-2", volume)) / "f") == ["z"]


async def test_removing_a_folder_leaves_what_others_have_put_into_it_meanwhile(node):
    volume = await node.volume()
    one, two = await node.attach("ta-1", volume), await node.attach("ta-2", volume)
    (one / "d").mkdir()
    (one / "d/a").write_bytes(b"1")
    await node.worker.commit("ta-1", volume)
    await node.worker.reload("ta-2", volume)
    (two / "d/b").write_bytes(b"2")
    await node.worker.commit("ta-2", volume)
    shutil.rmtree(one / "d")
    await node.worker.commit("ta-1", volume)
    assert await node.contents(volume) == {"d": None, "d/b": b"2"}


async def test_a_reload_is_refused_while_files_are_open_in_words_that_the_client_knows(node):
    volume = await node.volume()
    one = await node.attach("ta-1", volume)
    (one / "a").write_bytes(b"1")
    code = f"import time; f = open({str(one / 'a')!r}); print('open', flush=True); time.sleep(60)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and await process.stdout.readline() == b"open\n"
        with pytest.raises(FailedPrecondition, match="there are open files preventing the operation"):
            await node.worker.reload("ta-1", volume)
        await node.worker.commit("ta-1", volume)
    finally:
        process.kill()
        await process.wait()
    await node.worker.reload("ta-1", volume)


async def test_a_file_being_written_is_left_out_of_background_commits(node, monkeypatch):
    volume = await node.volume()
    one = await node.attach("ta-1", volume)
    (one / "done").write_bytes(b"done")
    with (one / "half").open("wb") as writer:
        writer.write(b"half")
        writer.flush()
        attachment = node.worker._get("ta-1", volume, "commit")
        await node.worker._commit(attachment, in_background=True)
        assert await node.contents(volume) == {"done": b"done"}
        await node.worker.commit("ta-1", volume)
        assert (await node.contents(volume))["half"] == b"half"
        writer.write(b" whole")
    await node.worker._commit(attachment, in_background=True)
    assert (await node.contents(volume))["half"] == b"half whole"


async def test_background_commits_happen_by_themselves(node, monkeypatch):
    monkeypatch.setattr(module, "BACKGROUND_COMMIT_S", 0.1)
    await node.worker.close()
    node.worker = WorkerVolumes(node.root, node.commits, overlays=node.overlays)
    await node.worker.open()
    volume = await node.volume()
    one = await node.attach("ta-1", volume)
    two = await node.attach("ta-2", volume, allow_background_commits=False)
    (two / "b").write_bytes(b"2")
    (one / "a").write_bytes(b"1")
    for _ in range(200):
        await asyncio.sleep(0.02)
        if await node.contents(volume):
            break
    assert await node.contents(volume) == {"a": b"1"}


async def test_the_last_commit_follows_the_container_also_when_the_server_is_away(node, monkeypatch):
    monkeypatch.setattr(module, "LAST_COMMIT_PAUSE_S", 0.01)
    volume = await node.volume()
    one = await node.attach("ta-1", volume)
    (one / "d").mkdir()
    (one / "d/a").write_bytes(b"1")
    node.is_away = True
    detaching = asyncio.create_task(node.worker.detach("ta-1"))
    await asyncio.sleep(0.05)
    node.is_away = False
    await detaching
    assert await node.contents(volume) == {"d": None, "d/a": b"1"}
    assert not any((node.root / f"volumes/{name}/ta-1").exists() for name in ("mounts", "folders"))
    two = await node.attach("ta-2", volume)
    assert (two / "d/a").read_bytes() == b"1"
    (two / "d/a").write_bytes(b"not kept")
    await node.worker.detach("ta-1")
    with pytest.raises(FailedPrecondition, match="not mounted here"):
        await node.worker.commit("ta-1", volume)


async def test_a_read_only_mount_reloads_and_never_commits(node):
    volume = await node.volume()
    one, two = await node.attach("ta-1", volume), await node.attach("ta-2", volume, read_only=True)
    (one / "a").write_bytes(b"1")
    await node.worker.commit("ta-1", volume)
    await node.worker.reload("ta-2", volume)
    assert (two / "a").read_bytes() == b"1"
    (two / "b").write_bytes(b"by accident")
    await node.worker.commit("ta-2", volume)
    await node.worker.detach("ta-2")
    assert await node.contents(volume) == {"a": b"1"}


async def test_a_sub_path_shows_one_folder_and_commits_into_it(node):
    volume = await node.volume()
    whole = await node.attach("ta-0", volume)
    (whole / "outside").write_bytes(b"0")
    await node.worker.commit("ta-0", volume)
    one = await node.attach("ta-1", volume, sub_path="a/b")
    assert os.listdir(one) == []
    (one / "d").mkdir()
    (one / "d/x").write_bytes(b"1")
    await node.worker.commit("ta-1", volume)
    (one / "d").rename(one / "e")
    await node.worker.commit("ta-1", volume)
    assert await node.contents(volume) == {
        "a": None,
        "a/b": None,
        "a/b/e": None,
        "a/b/e/x": b"1",
        "outside": b"0",
    }
    two = await node.attach("ta-2", volume, sub_path="/a/b/")
    assert os.listdir(two) == ["e"]
    (two / "e").rename(two / "f")
    await node.worker.commit("ta-2", volume)
    await node.worker.reload("ta-1", volume)
    assert (one / "f/x").read_bytes() == b"1" and os.listdir(one) == ["f"]
    with pytest.raises(InvalidArgument, match="twice"):
        await node.attach("ta-2", volume, sub_path="a")
    assert os.listdir(await node.attach("ta-3", volume, sub_path="made/for it", read_only=True)) == []
    assert (await node.contents(volume))["made/for it"] is None
    with pytest.raises(InvalidArgument, match=r"'\.\.'"):
        await node.attach("ta-4", volume, sub_path="../x")


async def test_a_link_that_a_container_puts_in_the_way_is_not_followed(node, tmp_path):
    volume = await node.volume()
    host = tmp_path / "host"
    host.mkdir()
    (host / "x").write_bytes(b"of the host")
    one, two = await node.attach("ta-1", volume), await node.attach("ta-2", volume)
    (one / "d").mkdir()
    (one / "d/x").write_bytes(b"1")
    (one / "f").write_bytes(b"2")
    await node.worker.commit("ta-1", volume)
    (two / "d").symlink_to(host)
    (two / "f").symlink_to(host / "x")
    await node.worker.reload("ta-2", volume)
    assert (host / "x").read_bytes() == b"of the host" and os.listdir(host) == ["x"]
    assert (await node.contents(volume))["d"] == str(host)
    await node.worker.reload("ta-1", volume)
    (one / "d").unlink()
    (one / "d").mkdir()
    (one / "d/y").write_bytes(b"3")
    await node.worker.commit("ta-1", volume)
    await node.worker.reload("ta-2", volume)
    assert os.listdir(host) == ["x"] and os.listdir(two / "d") == ["y"]


async def test_what_a_volume_cannot_hold_does_not_stop_a_commit(node):
    volume = await node.volume()
    one = await node.attach("ta-1", volume)
    os.mkfifo(one / "pipe")
    (one / "a").write_bytes(b"1")
    await node.worker.commit("ta-1", volume)
    Path(os.fsdecode(os.fsencode(one) + b"/b\xff")).touch()
    (one / "c").write_bytes(b"3")
    with pytest.raises(FailedPrecondition, match=r"b\\+xff"):
        await node.worker.commit("ta-1", volume)
    assert await node.contents(volume) == {"a": b"1", "c": b"3"}


async def test_a_volume_that_is_deleted_says_so(node):
    with pytest.raises(NotFound, match="vo-nope"):
        await node.attach("ta-1", "vo-nope")
    volume = await node.volume()
    one = await node.attach("ta-1", volume)
    (one / "a").write_bytes(b"1")
    await node.objects.delete(volume, ME)
    with pytest.raises(NotFound, match=volume):
        await node.worker.commit("ta-1", volume)
    await node.worker.detach("ta-1")


async def test_files_may_be_changed_in_place_without_touching_what_others_see(node):
    volume = await node.volume()
    one = await node.attach("ta-1", volume)
    (one / "a").write_bytes(b"12345")
    await node.worker.commit("ta-1", volume)
    two = await node.attach("ta-2", volume)
    with (two / "a").open("r+b") as file:
        file.write(b"XX")
    with (one / "a").open("ab") as file:
        file.write(b"6")
    assert ((one / "a").read_bytes(), (two / "a").read_bytes()) == (b"123456", b"XX345")
    assert (await node.contents(volume))["a"] == b"12345"
    await node.worker.commit("ta-2", volume)
    await node.worker.commit("ta-1", volume)
    assert (await node.contents(volume))["a"] == b"123456"


async def test_many_versions_make_few_layers_and_leave_none_behind(node):
    volume = await node.volume()
    writer = await node.attach("ta-w", volume)
    expected = {}
    (writer / "base").mkdir()
    for i in range(60):
        (writer / f"base/{i:03}").write_bytes(b"%d" % i)
        expected[f"base/{i:03}"] = b"%d" % i
    for i in range(12):
        (writer / f"base/{i:03}").unlink()
        del expected[f"base/{i:03}"]
        (writer / f"new{i}").mkdir()
        (writer / f"new{i}/f").write_bytes(b"%d" % i)
        expected[f"new{i}/f"] = b"%d" % i
        await node.worker.commit("ta-w", volume)
        reader = await node.attach(f"ta-{i}", volume)
        found = {str(p.relative_to(reader)): p.read_bytes() for p in reader.rglob("*") if p.is_file()}
        assert found == expected
        if i >= 2:
            await node.worker.detach(f"ta-{i - 2}")
    for task_id in list(node.worker._attached):
        await node.worker.detach(task_id)
    layers = list((node.root / "volumes/layers").iterdir())
    assert len(layers) <= (6 if node.overlays else 0)


async def test_writers_that_never_pause_leave_no_torn_file(node):
    """Files that each hold one repeated digit, rewritten all the time by two containers under commits and reloads."""
    volume = await node.volume()
    folders = [await node.attach(f"ta-{i}", volume) for i in range(2)]
    writers = []
    for i, folder in enumerate(folders):
        code = (
            "import os, sys, time\n"
            "end = time.time() + 3\n"
            "n = 0\n"
            "while time.time() < end:\n"
            f"    data = b'{i}%d' % (n % 10) * 50_000\n"
            f"    path = {str(folder)!r} + '/f%d' % (n % 5)\n"
            "    open(path + '.tmp', 'wb').write(data); os.replace(path + '.tmp', path); n += 1\n"
        )
        writers.append(await asyncio.create_subprocess_exec(sys.executable, "-c", code))
    num_checked = 0
    while any(writer.returncode is None for writer in writers):
        for i in range(2):
            await node.worker._commit(node.worker._get(f"ta-{i}", volume, "commit"), in_background=True)
            with contextlib.suppress(FailedPrecondition):
                await node.worker.reload(f"ta-{i}", volume)
        for path, data in (await node.contents(volume)).items():
            if not path.endswith(".tmp") and data:
                assert len(data) == 100_000 and data == data[:2] * 50_000
                num_checked += 1
        await asyncio.sleep(0.05)
    assert num_checked > 10


async def test_a_large_file_is_committed_once_and_not_read_again_when_it_moves(node, monkeypatch):
    monkeypatch.setattr(volume_changes, "REHASHED_MAX_BYTES", 1 << 20)
    monkeypatch.setattr(volume_changes, "HELD_MAX_BYTES", 1 << 20)
    volume = await node.volume()
    one = await node.attach("ta-1", volume)
    data = os.urandom(3 << 20)
    (one / "big").write_bytes(data)
    os.utime(one / "big", ns=(10**18, 10**18))
    await node.worker.commit("ta-1", volume)
    monkeypatch.setattr(VolumeFiles, "put_open_file", None)
    (one / "big").rename(one / "moved")
    (one / "moved").chmod(0o600)
    await node.worker.commit("ta-1", volume)
    assert await node.contents(volume) == {"moved": data}
    assert (await node.listing(volume))["moved"].mode == 0o600


async def test_a_worker_that_was_killed_leaves_nothing_behind(node):
    volume = await node.volume()
    one = await node.attach("ta-1", volume)
    (one / "uncommitted").write_bytes(b"1")
    node.worker._background.cancel()
    killed, node.worker = node.worker, WorkerVolumes(node.root, node.commits, overlays=node.overlays)
    await node.worker.open()
    assert not one.exists()
    assert all(list((node.root / "volumes" / name).iterdir()) == [] for name in ("mounts", "folders", "layers"))
    assert os.listdir(await node.attach("ta-2", volume)) == []
    for attachment in killed._attached["ta-1"].values():
        attachment.tree.close()
        attachment.close()


async def test_a_full_disk_is_said_and_commits_nothing(node, monkeypatch):
    volume = await node.volume()
    one = await node.attach("ta-1", volume)
    (one / "a").write_bytes(b"1")

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OutOfSpace, match="disk is full"):
            await node.worker.commit("ta-1", volume)
    assert await node.contents(volume) == {}
    await node.worker.commit("ta-1", volume)
    assert await node.contents(volume) == {"a": b"1"}


async def test_the_hook_shows_a_volume_at_its_place_and_where_clients_look(node, tmp_path):
    volume = await node.volume()
    mount = VolumeMountSpec(volume, "/data", read_only=True)
    spec = ContainerSpec("ta-1", "ap-1", "fu-1", "main", "im-1", volumes=(mount,))
    start = Start(spec, tmp_path / "folder", tmp_path / "socket")
    hook = VolumesHook(node.worker)
    await hook.apply(start)
    assert [(bind.target, bind.read_only) for bind in start.binds] == [
        (f"/__modal/volumes/{volume}", True),
        ("/data", True),
    ]
    assert all(bind.source.is_dir() for bind in start.binds)
    await hook.undo(start)
    assert not start.binds[0].source.exists()


async def test_what_is_renamed_here_though_removed_elsewhere_is_stored_again(node):
    volume = await node.volume()
    first = await node.attach("ta-0", volume)
    (first / "d").mkdir()
    (first / "d/a").write_bytes(b"content")
    await node.worker.commit("ta-0", volume)
    one = await node.attach("ta-1", volume)
    shutil.rmtree(first / "d")
    await node.worker.commit("ta-0", volume)
    node.files.delete(["s" + hashlib.sha256(b"content").hexdigest()])
    (one / "d").rename(one / "e")
    await node.worker.commit("ta-1", volume)
    assert await node.contents(volume) == {"e": None, "e/a": b"content"}


async def test_versions_that_only_hold_the_disk_are_let_go(node):
    volume = await node.volume()
    await node.attach("ta-0", volume)
    (node.worker._attached["ta-0"][volume].folder.source / "a").write_bytes(b"1")
    await node.worker.detach("ta-0")
    for task_id in ("ta-1", "ta-2"):
        await node.attach(task_id, volume)
    await node.worker.detach("ta-1")
    await node.worker._layers.forget([volume, "vo-other"])
    assert (node.worker._attached["ta-2"][volume].folder.source / "a").read_bytes() == b"1"
    await node.worker.detach("ta-2")
    assert list((node.root / "volumes/layers").iterdir()) == []
    await node.attach("ta-3", volume)


async def test_a_mount_inside_another_gets_a_place_that_is_not_committed(node, tmp_path):
    outer, inner, taken = await node.volume("outer"), await node.volume("inner"), await node.volume("taken")
    (await node.attach("ta-0", outer) / "file").write_text("in the way")
    await node.worker.commit("ta-0", outer)
    hook = VolumesHook(node.worker)

    async def start(task_id: str, *mounts: VolumeMountSpec) -> None:
        spec = ContainerSpec(task_id, "ap-1", "fu-1", "main", "im-1", volumes=mounts)
        await hook.apply(Start(spec, tmp_path / "folder", tmp_path / "socket"))

    for task_id, read_only in (("ta-1", False), ("ta-2", True)):
        around = VolumeMountSpec(outer, "/data", read_only=read_only)
        await start(task_id, VolumeMountSpec(inner, "/data/not/there"), around)
        place = node.worker._attached[task_id][outer].folder.source
        assert (place / "not/there").is_dir()
    (node.worker._attached["ta-1"][outer].folder.source / "not/mine").write_text("1")
    for task_id in ("ta-1", "ta-2"):
        await node.worker.commit(task_id, outer)
        await node.worker.detach(task_id)
    assert await node.contents(outer) == {"file": b"in the way", "not": None, "not/mine": b"1"}
    with pytest.raises(FailedPrecondition, match="'file' in the volume is no directory to mount on"):
        await start("ta-3", VolumeMountSpec(outer, "/data"), VolumeMountSpec(taken, "/data/file/deep"))
    await hook.undo(Start(ContainerSpec("ta-3", "", "", "", ""), tmp_path / "folder", tmp_path / "socket"))


async def test_a_container_of_an_older_namespace_sees_mounts_and_reloads_and_is_seen(tmp_path, monkeypatch):
    """As the process runtime does it: a namespace copied before, a bind in another copy of that one."""
    if not can_mount(tmp_path):
        pytest.skip("overlays cannot be mounted here")
    node = Node(tmp_path, True)
    await node.worker.open()
    try:
        volume = await node.volume()
        (tmp_path / "data").mkdir()
        code = f"""
import sys
from aeolian.worker.runtimes import view
view.enter_namespaces(False)
print("ready", flush=True)
source = sys.stdin.readline().strip()
view.unshare(view.CLONE_NEWNS)
view.mount(source, {str(tmp_path / "data")!r}, flags=view.MS_BIND | view.MS_REC)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None and process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        source = await node.attach("ta-1", volume)
        process.stdin.write(f"{source}\n".encode())

        async def in_container(line: str) -> None:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(line.replace("DATA", str(tmp_path / "data")).encode() + b"\n")
            assert await process.stdout.readline() == b"done\n"

        await in_container("open('DATA/a', 'w').write('of the container')")
        assert os.listdir(tmp_path / "data") == []
        await node.worker.commit("ta-1", volume)
        assert await node.contents(volume) == {"a": b"of the container"}
        (await node.attach("ta-2", volume) / "b").write_bytes(b"2")
        await node.worker.commit("ta-2", volume)
        await in_container("file = open('DATA/a')")
        with pytest.raises(FailedPrecondition, match="there are open files"):
            await node.worker.reload("ta-1", volume)
        await in_container("file.close()")
        await node.worker.reload("ta-1", volume)
        await in_container("assert open('DATA/b').read() == '2'")
        process.stdin.close()
        await process.wait()
    finally:
        await node.worker.close()
        await node.database.close()


@pytest.mark.slow
async def test_ten_thousand_small_files_are_committed_reloaded_and_shown(node):
    volume = await node.volume()
    one = await node.attach("ta-1", volume)
    await node.attach("ta-2", volume)
    for i in range(10_000):
        if i % 100 == 0:
            (one / f"d{i // 100}").mkdir()
        (one / f"d{i // 100}/{i}").write_bytes(hashlib.sha256(b"%d" % i).digest() * 32)
    timings = {}

    async def timed(name, awaitable):
        started = time.monotonic()
        result = await awaitable
        timings[name] = round(time.monotonic() - started, 2)
        return result

    await timed("commit", node.worker.commit("ta-1", volume))
    await timed("commit of nothing", node.worker.commit("ta-1", volume))
    (one / "d5/501").write_bytes(b"changed")
    await timed("commit of one", node.worker.commit("ta-1", volume))
    await timed("reload", node.worker.reload("ta-2", volume))
    await timed("attach", node.attach("ta-3", volume))
    await timed("attach again", node.attach("ta-4", volume))
    await timed("detach", node.worker.detach("ta-1"))
    assert len(await node.contents(volume)) == 10_100
    print("10,000 files of 1 KiB,", "overlay" if node.overlays else "plain", timings)
