import asyncio
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from some_environments import ME, ShiftedClock, SomeEnvironments

from aeolian.control.signed_urls import SignedUrls
from aeolian.control.volume_collector import BUSY_S, LARGE_BYTES, LENT_S, VolumeCollector
from aeolian.control.volume_commits import VolumeCommits
from aeolian.control.volume_contents import BlockFile, VolumeContents
from aeolian.control.volumes import Volumes
from aeolian.domain.errors import NotFound
from aeolian.domain.volumes import BLOCK_BYTES, EntryKind, Removal, VolumeChanges, VolumeEntry
from aeolian.storage.database import Database
from aeolian.storage.files import ContentStore
from aeolian.storage.volume_files import VolumeFiles

numbers = itertools.count()


@dataclass
class Disk:
    clock: ShiftedClock
    files: VolumeFiles
    collector: VolumeCollector
    volumes: Volumes
    contents: VolumeContents
    commits: VolumeCommits
    told: list[Sequence[str]] = field(default_factory=list)

    async def volume(self, name: str) -> str:
        return (await self.volumes.create(name, "", ME)).volume_id

    async def commit(self, volume_id: str, removed: Sequence[str] = (), **puts: bytes) -> list[str]:
        """As a container does; returns the content ids."""
        ids = [self.files.put_bytes(data) for data in puts.values()]
        pairs = zip(puts.items(), ids, strict=True)
        entries = tuple(VolumeEntry(p, EntryKind.FILE, 0o644, 1, len(data), content) for (p, data), content in pairs)
        removals = tuple(Removal(path) for path in removed)
        await self.commits.commit(volume_id, VolumeChanges(f"commit-{next(numbers)}", 1 << 40, (), removals, entries))
        return ids


@pytest.fixture
def disk(database: Database, tmp_path) -> Disk:
    clock, files = ShiftedClock(), VolumeFiles(tmp_path / "content")
    collector = VolumeCollector(database, clock, files)
    urls = SignedUrls(b"key", "http://127.0.0.1:1", clock)
    contents = VolumeContents(database, clock, files, ContentStore(tmp_path / "mounts"), urls, collector)
    volumes = Volumes(database, clock, SomeEnvironments())
    disk = Disk(clock, files, collector, volumes, contents, VolumeCommits(database, clock, files))
    collector.when_freed.append(disk.told.append)
    return disk


async def test_deleting_a_volume_frees_what_no_other_names(disk):
    one, two = await disk.volume("one"), await disk.volume("two")
    own, shared = await disk.commit(one, a=b"own", b=b"shared")
    await disk.commit(two, c=b"shared")
    variant = disk.files.inode(own, 0o600, 5)
    await disk.volumes.delete(one, ME)
    assert await disk.collector.free() is None
    assert not disk.files.has(own) and not variant.exists()
    assert disk.files.has(shared)
    assert disk.told == [[one]]
    await disk.volumes.delete(two, ME)
    assert await disk.collector.free() is None
    assert not disk.files.has(shared)


@pytest.mark.parametrize("how", ["rm", "rm -r", "overwritten", "removed by a container", "its environment", "its app"])
async def test_whatever_takes_a_file_away_frees_its_content(disk, how):
    volume = await disk.volume("one")
    if how == "its app":
        volume = (await disk.volumes.create_anonymous("", ME, app_id="ap-1")).volume_id
    [content] = await disk.commit(volume, **{"d/a": b"old"})
    await disk.collector.free()
    assert disk.files.has(content)
    match how:
        case "rm":
            await disk.contents.remove(volume, "d/a", recursive=False)
        case "rm -r":
            await disk.contents.remove(volume, "d", recursive=True)
        case "overwritten":
            await disk.commit(volume, **{"d/a": b"new"})
        case "removed by a container":
            await disk.commit(volume, ["d"])
        case "its environment":
            await disk.volumes.delete_in("en-main")
        case "its app":
            await disk.volumes.delete_owned_by("ap-1")
    await disk.collector.free()
    assert not disk.files.has(content)


async def test_a_copy_keeps_the_content(disk):
    volume = await disk.volume("one")
    [content] = await disk.commit(volume, a=b"1")
    await disk.contents.copy(volume, ["a"], "b", recursive=False)
    await disk.contents.remove(volume, "a", recursive=False)
    await disk.collector.free()
    assert disk.files.has(content)


async def test_content_that_comes_again_is_kept(disk):
    one, two = await disk.volume("one"), await disk.volume("two")
    [content] = await disk.commit(one, a=b"1")
    await disk.volumes.delete(one, ME)
    async with disk.files.in_use():  # a container is about to commit it
        assert disk.files.put_bytes(b"1") == content
        assert await disk.collector.free() == BUSY_S
        await disk.commit(two, a=b"1")
    assert await disk.collector.free() is None
    assert disk.files.has(content)


async def test_what_an_upload_will_need_is_kept_until_it_is_committed(disk):
    one, two = await disk.volume("one"), await disk.volume("two")
    [content] = await disk.commit(one, a=b"1")
    sha256s = [hashlib.sha256(b"1").digest()]
    other = BlockFile("large", 0o644, BLOCK_BYTES + 1, [hashlib.sha256(b"x").digest()] * 2)
    uploads = [BlockFile("a", 0o644, 1, sha256s), other]
    assert len(await disk.contents.put_block_files(two, uploads, overwrite=False)) == 2
    await disk.volumes.delete(one, ME)
    await disk.collector.free()
    assert disk.files.has(content)
    assert await disk.contents.put_block_files(two, uploads[:1], overwrite=False) == []
    await disk.volumes.delete(two, ME)
    await disk.collector.free()
    assert not disk.files.has(content)


async def test_a_download_may_end_though_its_file_is_replaced(disk):
    volume = await disk.volume("one")
    [content] = await disk.commit(volume, a=b"old")
    await disk.contents.slices(volume, "a")
    await disk.commit(volume, a=b"new")
    pause = await disk.collector.free()
    assert pause is not None and 0 < pause <= LENT_S + 1
    assert disk.files.has(content)
    disk.clock.advance(LENT_S + 1)
    assert await disk.collector.free() is None
    assert not disk.files.has(content)
    [content] = await disk.commit(volume, a=b"newer")
    await disk.contents.slices(volume, "a")
    await disk.volumes.delete(volume, ME)  # nobody can expect to go on with this
    assert await disk.collector.free() is None
    assert not disk.files.has(content)
    with pytest.raises(NotFound):
        await disk.contents.slices(volume, "a")


async def test_workers_are_told_of_what_is_worth_it(disk):
    volume = await disk.volume("one")
    await disk.commit(volume, a=b"small", b=bytes(LARGE_BYTES))
    await disk.contents.remove(volume, "a", recursive=False)
    await disk.collector.free()
    assert disk.told == []
    await disk.contents.remove(volume, "b", recursive=False)
    await disk.collector.free()
    assert disk.told == [[volume]]


async def test_it_works_by_itself_soon_after_a_removal(disk, monkeypatch):
    monkeypatch.setattr("aeolian.control.volume_collector.GATHER_S", 0.01)
    disk.volumes.when_dropped.append(disk.collector.wake)
    volume = await disk.volume("one")
    [content] = await disk.commit(volume, a=b"1")
    await disk.collector.open()
    try:
        await disk.volumes.delete(volume, ME)
        while disk.files.has(content):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    finally:
        await disk.collector.close()


async def test_many_contents_are_freed_in_parts(disk, monkeypatch):
    monkeypatch.setattr("aeolian.control.volume_collector.BATCH", 7)
    volume = await disk.volume("one")
    contents = await disk.commit(volume, **{f"f{n}": b"%d" % n for n in range(50)})
    await disk.volumes.delete(volume, ME)
    assert await disk.collector.free() is None
    assert not any(disk.files.has(content) for content in contents)
