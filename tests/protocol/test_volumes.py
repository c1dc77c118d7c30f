"""Volumes as the official client sees them."""

import hashlib
import io
import os
import time

import aiohttp
import modal
import pytest
from modal.exception import InvalidError, NotFoundError
from storage_server import storage_server

from aeolian.control import volumes as control
from aeolian.control.volume_contents import BlockFile
from aeolian.domain.caller import Caller
from aeolian.domain.errors import InvalidArgument, NotFound
from aeolian.domain.volumes import BLOCK_BYTES, EntryKind, VolumeChanges, VolumeEntry
from aeolian.storage import volume_files


@pytest.fixture
async def server(tmp_path, monkeypatch):
    async with storage_server(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture(params=[1, 2])
async def volume(server, request):
    volume = modal.Volume.from_name("data", create_if_missing=True, version=request.param, client=server.client)
    await volume.hydrate.aio()
    return volume


async def upload(volume, files: dict[str, bytes], **options):
    async with volume.batch_upload.aio(**options) as batch:
        for path, data in files.items():
            batch.put_file(io.BytesIO(data), path)


async def read(volume, path) -> bytes:
    return b"".join([chunk async for chunk in volume.read_file.aio(path)])


async def paths(volume, path="/", recursive=True):
    return [entry.path for entry in await volume.listdir.aio(path, recursive=recursive)]


async def test_what_is_uploaded_is_listed_and_read_back(volume):
    big = os.urandom(2 * BLOCK_BYTES + 12345)
    files = {
        "/a.txt": b"hello",
        "/dir/empty": b"",
        "/dir/deep/big.bin": big,
        "/zeros": bytes(100),
        "/tail": b"x" + bytes(9),
    }
    await upload(volume, files)
    for path, data in files.items():
        assert await read(volume, path) == data
    assert await paths(volume) == ["a.txt", "dir", "dir/deep", "dir/deep/big.bin", "dir/empty", "tail", "zeros"]
    assert await paths(volume, "/", recursive=False) == ["a.txt", "dir", "tail", "zeros"]
    assert await paths(volume, "dir/") == ["dir/deep", "dir/deep/big.bin", "dir/empty"]
    [entry] = await volume.listdir.aio("/dir/deep/big.bin")
    assert (entry.path, entry.size, entry.type) == ("dir/deep/big.bin", len(big), modal.volume.FileEntryType.FILE)
    assert abs(entry.mtime - time.time()) < 60


async def test_symbolic_links_are_followed_inside_the_volume_only(server, volume):
    await upload(volume, {"/d/e/f": b"1"})
    links = {"l": "d", "d/up": "../d/e", "d/e/g": "f", "out": "../x", "etc": "/etc", "loop": "loop", "gone": "nothing"}
    puts = tuple(VolumeEntry(path, EntryKind.SYMLINK, 0o777, 0, 0, target) for path, target in links.items())
    await server.commits.commit(volume.object_id, VolumeChanges("c", 1, puts=puts))
    for path in ("d/e/f", "l/e/f", "l/up/f", "d/up/g", "l/up/g"):
        assert await read(volume, path) == b"1"
    for path, message in (
        ("out", "outside the volume"),
        ("etc/passwd", "outside the volume"),
        ("loop", "too many symbolic links"),
        ("loop/x", "too many symbolic links"),
        ("l/up", "is a directory"),
    ):
        with pytest.raises(InvalidError, match=message):
            await read(volume, path)
    with pytest.raises(FileNotFoundError, match="'gone'"):
        await read(volume, "gone")
    with pytest.raises(InvalidError, match="'l' is not a directory"):
        await upload(volume, {"/l/new": b"1"})
    assert [entry.type.name for entry in await volume.listdir.aio("l")] == ["SYMLINK"]


async def test_blocks_of_zeros_at_any_place_come_back(volume):
    data = bytes(BLOCK_BYTES) + b"middle" + bytes(2 * BLOCK_BYTES)
    await upload(volume, {"/sparse": data, "/all-zeros": bytes(BLOCK_BYTES + 1)})
    assert await read(volume, "/sparse") == data
    assert await read(volume, "/all-zeros") == bytes(BLOCK_BYTES + 1)


async def test_an_upload_overwrites_only_with_force_and_never_a_directory(volume):
    await upload(volume, {"/dir/a": b"1"})
    with pytest.raises(FileExistsError, match="'dir/a' already exists"):
        await upload(volume, {"/dir/a": b"2", "/b": b"2"})
    assert await paths(volume) == ["dir", "dir/a"]
    await upload(volume, {"/dir/a": b"2"}, force=True)
    assert await read(volume, "dir/a") == b"2"
    with pytest.raises(FileExistsError, match="is a directory"):
        await upload(volume, {"/dir": b"2"}, force=True)
    with pytest.raises(InvalidError, match="'dir/a' is not a directory"):
        await upload(volume, {"/dir/a/b": b"2"}, force=True)


async def test_files_and_directories_are_removed(volume):
    await upload(volume, {"/d/a": b"1", "/d/e/b": b"2", "/dx": b"3"})
    await volume.remove_file.aio("d/a")
    with pytest.raises(FileNotFoundError, match="'d/a'"):
        await volume.remove_file.aio("d/a")
    with pytest.raises(InvalidError, match="recursive"):
        await volume.remove_file.aio("d")
    await volume.remove_file.aio("/d", recursive=True)
    assert await paths(volume) == ["dx"]
    with pytest.raises(FileNotFoundError):
        await read(volume, "d/e/b")
    with pytest.raises(NotFoundError, match="'d'"):
        await paths(volume, "d")


async def test_copies_follow_cp(volume):
    await upload(volume, {"/a": b"1", "/b": b"2", "/d/x": b"3"})
    await volume.copy_files.aio(["a"], "c")
    await volume.copy_files.aio(["a", "/b"], "/d")
    assert await paths(volume) == ["a", "b", "c", "d", "d/a", "d/b", "d/x"]
    assert await read(volume, "d/b") == b"2"
    with pytest.raises(InvalidError, match="'c' is not a directory"):
        await volume.copy_files.aio(["a", "b"], "c")
    with pytest.raises(InvalidError, match="recursive"):
        await volume.copy_files.aio(["d"], "e")
    with pytest.raises(NotFoundError, match="'nope'"):
        await volume.copy_files.aio(["nope"], "e")


async def test_directories_are_copied_recursively(server):
    volume = modal.Volume.from_name("v2", create_if_missing=True, version=2, client=server.client)
    await upload(volume, {"/d/x": b"3", "/d/e/y": b"4"})
    await volume.copy_files.aio(["d"], "f", recursive=True)
    await volume.copy_files.aio(["d"], "f", recursive=True)
    assert await paths(volume, "f") == ["f/d", "f/d/e", "f/d/e/y", "f/d/x", "f/e", "f/e/y", "f/x"]
    with pytest.raises(InvalidError, match="into itself"):
        await volume.copy_files.aio(["d"], "d/e", recursive=True)


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/..", "a//b", "a\0b", "%2e%2e/x", "..%2fx", "%252e%252e/x", "x" * 300]
)
async def test_paths_that_climb_out_or_trick_are_refused(server, path):
    volume = modal.Volume.from_name("paths", create_if_missing=True, client=server.client)
    await upload(volume, {"/ok": b"1"}, force=True)
    for attempt in (
        lambda: read(volume, path),
        lambda: paths(volume, path),
        lambda: volume.remove_file.aio(path),
        lambda: volume.copy_files.aio(["ok"], path),
        lambda: volume.copy_files.aio([path], "z"),
    ):
        with pytest.raises(InvalidError, match=r"path '"):
            await attempt()
    if path != "a//b":  # the client itself makes it a/b
        with pytest.raises(InvalidError, match=r"path '"):
            await upload(volume, {path: b"1"})
    assert "ok" in await paths(volume)


async def test_a_thousand_small_files_go_up_and_down(server, tmp_path):
    volume = modal.Volume.from_name("many", create_if_missing=True, client=server.client)
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(1000):
        (folder / f"{i:04}.txt").write_bytes(b"number %d" % i)
    started = time.monotonic()
    async with volume.batch_upload.aio() as batch:
        batch.put_directory(folder, "/in")
    seconds = time.monotonic() - started
    assert len(await paths(volume, "in")) == 1000
    assert await read(volume, "in/0999.txt") == b"number 999"
    print(f"1,000 files uploaded in {seconds:.2f} s")


async def test_volumes_are_created_found_listed_renamed_and_deleted(server):
    manager = modal.Volume.objects
    for name in ("one", "two", "three"):
        await manager.create.aio(name, client=server.client)
    with pytest.raises(modal.exception.AlreadyExistsError, match="'one'"):
        await manager.create.aio("one", client=server.client)
    await manager.create.aio("one", allow_existing=True, client=server.client)
    assert [v.name for v in await manager.list.aio(client=server.client)] == ["three", "two", "one"]
    assert [v.name for v in await manager.list.aio(client=server.client, max_objects=1)] == ["three"]
    await modal.Volume.rename.aio("two", "zwei", client=server.client)
    with pytest.raises(modal.exception.AlreadyExistsError, match="'one'"):
        await modal.Volume.rename.aio("zwei", "one", client=server.client)
    await manager.delete.aio("one", client=server.client)
    with pytest.raises(NotFoundError, match="'one' not found in environment"):
        await manager.delete.aio("one", client=server.client)
    assert [v.name for v in await manager.list.aio(client=server.client)] == ["three", "zwei"]
    found = modal.Volume.from_name("zwei", client=server.client)
    await found.hydrate.aio()
    again = modal.Volume.from_id(found.object_id, client=server.client)
    assert (await again.info.aio()).name == "zwei"
    with pytest.raises(InvalidError, match="version v2, not v1"):
        await modal.Volume.from_name("zwei", version=1, client=server.client).hydrate.aio()


async def test_volumes_of_one_name_in_two_environments_are_two(server):
    one = modal.Volume.from_name("x", create_if_missing=True, client=server.client)
    two = modal.Volume.from_name("x", create_if_missing=True, environment_name="dev", client=server.client)
    await upload(one, {"/a": b"1"})
    assert await paths(two) == []
    assert one.object_id != two.object_id


async def test_more_than_a_hundred_volumes_are_listed_by_page(server):
    for i in range(120):
        await modal.Volume.objects.create.aio(f"v{i:03}", client=server.client)
    listed = await modal.Volume.objects.list.aio(client=server.client)
    assert [v.name for v in listed] == [f"v{i:03}" for i in reversed(range(120))]


async def test_an_ephemeral_volume_works_and_has_no_name(server):
    async with modal.Volume.ephemeral.aio(client=server.client) as volume:
        await upload(volume, {"/a": b"1"})
        assert await paths(volume) == ["a"]
        assert await modal.Volume.objects.list.aio(client=server.client) == []


async def test_commit_outside_a_container_says_so(server):
    volume = modal.Volume.from_name("x", create_if_missing=True, client=server.client)
    with pytest.raises(RuntimeError, match="inside a container that mounts it"):
        await volume.commit.aio()


async def test_unknown_ids_and_bad_names_are_refused(server):
    with pytest.raises(NotFoundError, match="vo-nope"):
        await modal.Volume.from_id("vo-nope", client=server.client).hydrate.aio()
    caller = Caller("local", token_id="ak-test")
    for name in ("", "a/b", "ü", "x" * 65, "vo-0123456789012345678901"):
        with pytest.raises(InvalidArgument, match="is not a name for a Volume"):
            await server.volumes.create(name, "", caller)
    with pytest.raises(InvalidArgument, match="version 3 does not exist"):
        await server.volumes.create("x", "", caller, fs_version=3)


async def test_an_ephemeral_volume_goes_when_its_client_falls_silent(server, monkeypatch):
    caller = Caller("local", token_id="ak-test")
    volume = await server.volumes.create_anonymous("", caller)
    owned = await server.volumes.create_anonymous("", caller, app_id="ap-1")
    await server.volumes.sweep()
    await server.volumes.heartbeat(volume.volume_id, caller)
    monkeypatch.setattr(control, "HEARTBEAT_TIMEOUT_S", -1.0)
    await server.volumes.sweep()
    with pytest.raises(NotFound, match=volume.volume_id):
        await server.volumes.heartbeat(volume.volume_id, caller)
    assert (await server.volumes.get(owned.volume_id, caller)).kind == "owned"
    await server.volumes.delete_owned_by("ap-1")
    with pytest.raises(NotFound):
        await server.volumes.get(owned.volume_id, caller)


async def test_content_that_no_volume_names_is_collected_after_a_day(server, monkeypatch):
    volume = modal.Volume.from_name("x", create_if_missing=True, client=server.client)
    await upload(volume, {"/a": b"kept", "/b": b"dropped"})
    await volume.remove_file.aio("b")
    assert await server.collector.collect() == 0
    monkeypatch.setattr(volume_files, "UNUSED_LIFETIME_S", -60.0)
    assert await server.collector.collect() == 1
    assert await read(volume, "a") == b"kept"


async def test_an_upload_cut_off_in_the_middle_goes_on_where_it_was(server):
    """A block that arrived is not asked for again, one that broke off is."""
    volume = await server.volumes.create("x", "", Caller("local", token_id="ak-test"))
    blocks = [os.urandom(BLOCK_BYTES), os.urandom(1000)]
    sha256s = [hashlib.sha256(block).digest() for block in blocks]
    file = BlockFile("f", 0o644, BLOCK_BYTES + 1000, sha256s)

    async def missing():
        return await server.contents.put_block_files(volume.volume_id, [file], overwrite=False)

    first, second = await missing()
    async with aiohttp.ClientSession() as session:
        for body, status in ((blocks[0][:-1], 400), (blocks[0], 200)):
            async with session.put(first.put_url, data=body) as reply:
                assert reply.status == status
        [left] = await missing()
        assert left.block_index == second.block_index == 1
        async with session.put(left.put_url.replace("/1?", "/0?"), data=blocks[1]) as reply:
            assert reply.status == 403
        async with session.put(left.put_url, data=blocks[1]) as reply:
            assert reply.status == 200
    assert await missing() == []
    slices = await server.contents.slices(volume.volume_id, "f", BLOCK_BYTES - 10, 20)
    async with aiohttp.ClientSession() as session:
        parts = []
        for url in slices.urls:
            async with session.get(url) as reply:
                parts.append(await reply.read())
    assert parts == [blocks[0][-10:], blocks[1][:10]]
